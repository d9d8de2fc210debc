"""What is shown of a decode is what decoding does, and the page shows it in a real browser."""
import html
import json
import re
import shutil
import subprocess

import pytest
import torch

from gto.engine import Engine
from gto.evaluate import diagnosis, fixed_text, tau
from gto.page import tree_text, watch, write_page
from gto.tree import TreeShape
from gto.verify import Sampling
from tests.tiny import tiny_models, tiny_prompts

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SHAPE = TreeShape(3, 4, 8)


class Five:
    """An encoding of few tokens, so that random drafts are often right; two of them would end the page's script, one is
    half a character."""
    texts = b"<", b"/script>", b" a", b"\n", b"\xc3"

    def decode_single_token_bytes(self, token):
        return self.texts[token]

    def decode(self, tokens):
        return b"".join(self.texts[token] for token in tokens).decode(errors="replace")


def engine_of(temperature=0.0):
    return Engine(*tiny_models(4, vocab=5), SHAPE, Sampling(temperature), capacity=60)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_watching_does_not_change_the_decode(temperature):
    engine, other, prompt, accepted = engine_of(temperature), engine_of(temperature), [3, 1, 4], 0
    torch.manual_seed(5)
    expected = [new for (new,) in engine.generate([prompt], 40)]
    torch.manual_seed(5)
    cycles = watch(other, prompt, Five(), 40)["cycles"]
    assert [len(cycle["emitted"]) for cycle in cycles] == [len(new) for new in expected]
    text = "".join(piece for cycle in cycles for piece in cycle["emitted"])
    assert Five().decode(sum(expected, [])).startswith(text) and len(text) > 35
    committed = prompt + expected[0]
    for cycle, new in zip(cycles[1:], expected[1:]):
        nodes = cycle["nodes"]
        paths = [[]]                                              # token ids from below the root
        for i, node in enumerate(nodes[1:], 1):
            assert node["parent"] < i and (node["kept"] or nodes[node["parent"]]["kept"])
            assert node["path"] == pytest.approx(nodes[node["parent"]]["path"] * node["head"], rel=1e-4)
            token = next(t for t, text in enumerate(Five.texts) if text.decode(errors="replace") == node["token"])
            paths.append(paths[node["parent"]] + [token])
            *_, hidden = engine.target(torch.tensor([committed + paths[node["parent"]]]))[0][0]
            p = torch.softmax(engine.target.logits(hidden) / (temperature or 1), -1)[token]
            assert node["target"] == pytest.approx(p.item(), abs=1e-5)
        kept = [node for node in nodes[1:] if node["kept"]]
        cut = [node for node in nodes[1:] if not node["kept"]]
        assert len(kept) == 8 and min(n["path"] for n in kept) >= max((n["path"] for n in cut), default=0)
        assert max(sum(n["parent"] == i for n in cut) for i in range(len(nodes))) <= 1
        chosen = [path for path, node in zip(paths, nodes) if node["accepted"]]
        if new is not expected[-1]:                               # which may have been cut short
            assert chosen == [new[:i] for i in range(len(new))]   # the root's, then deeper and deeper
        accepted += len(chosen) - 1
        committed += new
    assert accepted > 5


def test_a_tree_as_text():
    watched = watch(engine_of(), [3, 1, 4], Five(), 8)
    lines, cycle = tree_text(watched).splitlines(), watched["cycles"][1]
    assert len(lines) == len(cycle["nodes"]) + 1 and sum("pruned" in line for line in lines) == len(cycle["nodes"]) - 9
    assert sum("accepted" in line for line in lines) == len(cycle["emitted"]) - 1 and "'\\n'" in "".join(lines)
    assert tree_text(watch(engine_of(), [3, 1, 4], Five(), 1)).startswith("no tree")


def test_promises_and_depths_add_up():
    """All that is accepted is counted once in each figure."""
    target, head = tiny_models(4, vocab=5)
    for T in (0.0, 1.0):
        fixed = fixed_text(target, tiny_prompts(6, 5), 30, T, SHAPE.depth)
        lengths, _, _, reached, ((promised, accepted),) = diagnosis(head, fixed, SHAPE, 1.0, bins=1)
        cycles = (fixed.end - fixed.start) / lengths              # at least: a last cycle may go too far
        assert torch.equal(lengths, tau(head, fixed, SHAPE, 1.0)) and len(cycles) == 6
        assert accepted * SHAPE.nodes == pytest.approx(sum(reached), abs=1e-5) and 0 < promised < 1
        assert reached == sorted(reached, reverse=True) and reached[0] > 0.2


def page_of_a_run(path):
    by_depth = {"0": {"draft": [0.9, 0.5], "gto": [0.95, 0.6]}}
    rows = [{"T": "0", "method": "ar", "tau": 1.0}] + [
        {"T": "0", "method": name, "tau": 2.5, "±": 0.1, "by seed": [2.4, 2.6]} for name in by_depth["0"]]
    calibration = {"0": {0.4: [[0.1, 0.2], [0.8, 0.7]]}}
    log = [{"stage": stage, "step": step, "seconds": step, "loss": 3 / step, "token_loss": 2 / step, "reward": step}
           for stage in ("target", "draft", "control", "gto") for step in (10, 20)]
    decode = watch(engine_of(), [3, 1, 4], Five(), 40)
    more = {"by_depth": by_depth, "calibration": calibration, "log": log}
    write_page(path, "A <run>", decode, ["It & its \"notes\"."], rows, **more)
    return decode["cycles"]


DRIVER = """<script>
const steps = [], all = selector => [...document.querySelectorAll(selector)]
for (const [i] of data.decode.cycles.entries()) {
  if (i % 2) $("next").click(); else if (i) document.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight"}))
  else { $("at").value = 0; $("at").oninput() }
  $("cut").checked = i % 3 == 0; $("cut").onchange()
  steps.push({now: all("#text .now").map(span => span.textContent), nodes: all("#tree .node").length,
              accepted: all("#tree .node.accepted").length, says: $("says").textContent})
}
all("#text .drafted")[0].click()
all("#tree .node")[1].onclick()
const found = {errors, steps, title: document.title, text: $("text").textContent, figures: all("figure").length,
               clicked: all("#text .now").length, detail: $("detail").textContent, rows: all("tr").length,
               notes: $("notes").textContent, wide: document.documentElement.scrollWidth, inner: innerWidth}
parent.document.body.replaceChildren(element("pre", {}, JSON.stringify(found)))
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_in_a_browser(tmp_path, width):
    cycles = page_of_a_run(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page), "it needs no network"
    watched = page.replace("<script>", "<script>const errors = []; onerror = e => errors.push(e)</script><script>", 1)
    # In a frame, because a window has a least width.
    frame = f"<iframe style='width: {width}px' srcdoc='{html.escape(watched + DRIVER)}'></iframe>"
    (tmp_path / "driven.html").write_text(f"<meta charset='utf-8'>{frame}", encoding="utf-8")
    shown = subprocess.run([BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,900",
                            f"--user-data-dir={tmp_path}/profile", "--dump-dom", (tmp_path / "driven.html").as_uri()],
                           capture_output=True, text=True, encoding="utf-8", timeout=120).stdout
    found = json.loads(html.unescape(re.search("<pre>(.*)</pre>", shown, re.DOTALL).group(1)))
    assert not found["errors"] and found["title"] == "A <run>" and found["notes"] == 'It & its "notes".'
    assert found["text"] == Five().decode([3, 1, 4]) + "".join(sum((cycle["emitted"] for cycle in cycles), []))
    for i, (step, cycle) in enumerate(zip(found["steps"], cycles, strict=True)):
        assert step["now"] == cycle["emitted"]
        assert step["nodes"] == sum(node["kept"] or i % 3 == 0 for node in cycle["nodes"])
        assert step["accepted"] == sum(node["accepted"] for node in cycle["nodes"])
        assert i == 0 or f"{len(cycle['emitted']) - 1} of 8 drafts" in step["says"] or cycle is cycles[-1]
    assert found["clicked"] >= 2 and "head 0." in found["detail"] and found["rows"] == 4
    assert found["figures"] == 3 + 4 + 1 and found["wide"] <= found["inner"] == width
