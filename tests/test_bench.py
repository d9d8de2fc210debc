"""The benchmark: its counters against independent recounts, its tables, its figure, and what it says to bad input."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gto import bench, checkpoint, plot
from gto.bench import conversation, divergences, named_paths
from gto.bpe import save_ranks
from gto.diagnose import dissect, greedy_depth
from gto.engine import Engine
from gto.errors import UserError
from gto.evaluate import timed
from gto.policy import Costs, Learned, Space, save_policy
from gto.summary import summary
from gto.tokenizer import END_OF_TEXT, GPT2_PATTERN, describe, make_encoding
from gto.tree import Tree, TreeShape, ancestor_mask
from gto.verify import Sampling
from tests.tiny import tiny_models, tiny_prompts

LETTERS = 5                                                       # so few that random drafts are often right


def engine_of(shape, temperature=0.0, head=True):
    target, draft_head = tiny_models(vocab=LETTERS)
    return Engine(target, draft_head if head else None, TreeShape.parse(shape), Sampling(temperature), capacity=200)


def bytes_encoding(specials=(END_OF_TEXT,)):
    ranks = {bytes([byte]): byte for byte in range(256)}
    return make_encoding("bytes", GPT2_PATTERN, ranks, {name: 256 + i for i, name in enumerate(specials)})


# Diagnosis --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_chain_is_its_own_greedy_path(temperature):
    engine = engine_of("1,4,4", temperature)
    accepted = []
    for prompt in tiny_prompts(3, LETTERS):
        cycles = dissect(engine, prompt, 40)
        assert cycles["greedy"] == cycles["tree"] and set(cycles["kept"]) == {4}
        accepted += cycles["tree"]
    assert len(set(accepted)) > 2                                 # else the test shows nothing


def test_greedy_path_alone_is_what_a_chain_accepts_from_the_same_text():
    engine, chain = engine_of("3,4,8"), engine_of("1,4,4")
    pruned = 0
    for prompt in tiny_prompts(2, LETTERS):
        cycles = dissect(engine, prompt, 40)
        _, text, _ = timed(engine, prompt, 60)
        start = 1
        for tree, path, kept in zip(cycles["tree"], cycles["greedy"], cycles["kept"]):
            chain.prefill([prompt + text[:start - 1]])
            assert len(next(chain.cycles())[0]) - 1 == path
            assert tree >= min(path, kept)                        # what is kept of the path is accepted like any other
            pruned += kept < 4
            start += tree + 1
    assert pruned


def test_dissection_changes_nothing():
    for head in (True, False):
        engine = engine_of("3,4,8", head=head)
        for prompt in tiny_prompts(3, LETTERS):
            _, _, accepted = timed(engine, prompt, 30)
            cycles = dissect(engine, prompt, 30)
            assert cycles["tree"] == accepted
            assert len(cycles["draft"]) == len(cycles["verify"]) == len(accepted)


def test_both_passes_end_at_a_stop_token():
    engine = engine_of("3,4,8")
    prompt = tiny_prompts(1, LETTERS)[0]
    _, text, accepted = timed(engine, prompt, 60)
    stop = {next(token for i, token in enumerate(text) if i > 3 and token not in text[:3])}
    _, short, fewer = timed(engine, prompt, 60, stop)
    assert short == text[:len(short)] and stop & set(short) and not stop & set(short[:len(short) - fewer[-1] - 1])
    assert dissect(engine, prompt, 60, stop)["tree"] == fewer == accepted[:len(fewer)]


def test_greedy_depth_needs_the_whole_path():
    # Greedy path 7 8 9. First tree: root, 7, 5, 7-8. Second: 6, 6-8, 6-8-9: right tokens below a wrong one.
    tokens, parents = torch.tensor([[1, 7, 5, 8], [1, 6, 8, 9]]), torch.tensor([[0, 0, 0, 1], [0, 0, 1, 2]])
    mask = ancestor_mask(parents, 3)
    tree = Tree(tokens, parents, mask, mask.sum(-1) - 1, torch.zeros(2, 4))
    greedy = tree._replace(tokens=torch.tensor([[1, 7, 8, 9]]).expand(2, -1))
    assert greedy_depth(tree, greedy).tolist() == [2, 0]


# Summary ----------------------------------------------------------------------------------------------------------

def result(seconds, accepted, greedy=(), kept=()):
    inside = {"draft": [1.0] * len(accepted), "verify": [2.0] * len(accepted), "tree": accepted, "greedy": list(greedy),
              "kept": list(kept)}
    return {"seconds": [seconds / len(accepted) for _ in accepted], "emitted": sum(accepted) + len(accepted),
            "accepted": accepted, "inside": inside}


def test_summary_counts_the_bonus_token_and_pairs_by_prompt():
    mine = [result(0.02, [2, 1], [2, 0], [3, 1]), result(0.03, [0, 3, 3], [0, 1, 3], [2, 3, 3]), result(0, [])]
    plain = [result(0.05, [0] * 5), result(0.09, [0] * 9), result(0.0, [])]
    row = summary(mine, plain, levels=3)
    assert row["prompts"] == 2 and row["cycles"] == 5 and row["tokens"] == 14
    assert row["tau"] == pytest.approx(14 / 5)
    assert row["tokens_per_s"][1] == pytest.approx((250 + 300) / 2)
    assert row["speedup"][1] == pytest.approx((2.5 + 3.0) / 2)    # plain: 100 tokens/s on both
    assert row["accepted"] == pytest.approx([1 / 5, 1 / 5, 1 / 5, 2 / 5])
    assert (row["cycle_ms"], row["draft_ms"], row["verify_ms"], row["rest_ms"]) == pytest.approx((10, 1, 2, 7))
    assert row["pruned"] == pytest.approx(2 / 5) and row["matched"] == pytest.approx(3 / 5)
    assert row["tau_greedy_path"] == pytest.approx(1 + 6 / 5) and row["tau_same_cycles"] == pytest.approx(1 + 9 / 5)


def test_summary_refuses_answers_without_a_cycle():
    with pytest.raises(UserError, match="first token"):
        summary([result(0.0, [])], [result(0.0, [])], levels=3)


def test_a_divergence_is_listed_with_its_gap():
    target, _ = tiny_models()
    prompt, answer = [3, 1, 4], [5, 9, 2, 6]
    place = {"question": 7, "turn": 0, "prompt": prompt}
    plain = [{**place, "answer": answer}, {**place, "answer": answer}]
    mine = [{**place, "answer": answer}, {**place, "answer": [5, 9, 8, 6]}]
    found, = divergences(target, mine, plain)
    assert (found["question"], found["position"], found["plain"], found["here"]) == (7, 2, 2, 8)
    best = target.logits(target(torch.tensor([prompt + [5, 9]]))[0][0, -1]).sort(descending=True).values
    assert found["gap"] == pytest.approx((best[0] - best[1]).item(), abs=1e-5)


# Conversations ----------------------------------------------------------------------------------------------------

def test_history_without_template_keeps_the_answers_tokens():
    ids = conversation(["ab", "c"], [[200, 256]], bytes_encoding())
    assert ids == [*b"ab", 200, 256, *b"c"]


def test_history_with_template():
    encoding = bytes_encoding(("<|im_start|>", "<|im_end|>", "<|endoftext|>"))
    ids = conversation(["ab", "c"], [list(b" yes ")], encoding, "qwen3", "be short")
    text = encoding.decode(ids)
    assert text.startswith("<|im_start|>system\nbe short<|im_end|>\n<|im_start|>user\nab<|im_end|>")
    assert "<|im_start|>assistant\nyes<|im_end|>" in text.replace("<think>\n\n</think>\n\n", "")
    assert text.count("<|im_start|>user") == 2 and encoding.encode_single_token("<|im_end|>") in ids


def test_heads_are_named_by_flag_or_file():
    assert named_paths(["a=x/y.pt", "x/eagle.pt"]) == {"a": "x/y.pt", "eagle": "x/eagle.pt"}
    for bad in (["a=x", "a=y"], ["=x"], ["a="], ["plain=x"]):
        with pytest.raises(UserError, match="NAME=PATH"):
            named_paths(bad)


# The program ------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Tokenizer, two-turn questions and checkpoints in a folder; returns the folder and the flags that name them."""
    folder = tmp_path_factory.mktemp("bench")
    encoding = bytes_encoding()
    save_ranks(folder / "tokenizer.model", encoding._mergeable_ranks)
    (folder / "meta.json").write_text(json.dumps(describe(encoding)))
    questions = [{"turns": ["def f(", "again"]}, {"turns": ["import os"]}]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    target, head = tiny_models(vocab=257)
    checkpoint.save_model(folder / "target.pt", target)
    checkpoint.save_model(folder / "head.pt", head)
    torch.manual_seed(0)
    costs = Costs(torch.ones(1, 4), torch.ones(1, 4, 3))
    save_policy(folder / "policy-head.pt", Learned(Space(3, 4, (0, 5, 9)), 16), costs, 1.0, "ltd")
    return folder, ["--target", f"{folder}/target.pt", "--head", f"tiny={folder}/head.pt", "--tokenizer", str(folder),
                    "--device", "cpu"]


def test_whole_benchmark(files, capsys, tmp_path):
    folder, flags = files
    bench.main([*flags, "--tree", "1,3,3", "--tree", "3,3,6", "--adaptive", "--max-new-tokens", "12", "--json",
                f"{tmp_path}/b.json"])
    out = capsys.readouterr().out
    report = json.loads(out.splitlines()[-1])
    assert report == json.loads((tmp_path / "b.json").read_text())
    methods = ["plain", "tiny, tree 1,3,3", "tiny, tree 3,3,6", "tiny, adaptive"]
    assert [(row["T"], row["method"]) for row in report["rows"]] == [(t, m) for t in (0.0, 1.0) for m in methods]
    assert report["answers"] == 3 and not report["divergences"]
    for row in report["rows"]:
        assert row["prompts"] == 3 and sum(row["accepted"]) == pytest.approx(1)
        assert row["tau"] == pytest.approx(1 + sum(n * share for n, share in enumerate(row["accepted"])))
        assert f"| {row['T']:g} | {row['method']} | {row['tau']:.2f}" in out
        assert row["method"] != "plain" or row["tau"] == 1 and row["speedup"] == [1, 1, 1]
        assert row["T"] == 1 or row["equal"] == 3
    assert "Greedy answers equal to plain decoding's: 9 of 9" in out


def test_second_turns_follow_plain_decodings_answer(files, monkeypatch):
    folder, flags = files
    seen, measure = [], bench.measure
    monkeypatch.setattr(bench, "measure", lambda engine, prompt, *rest: seen.append((prompt, measure(
        engine, prompt, *rest))) or seen[-1][1])
    bench.main([*flags, "--tree", "1,3,3", "--max-new-tokens", "6", "--temperature", "1", "--limit", "1"])
    first, second = seen[2:4], seen[4:]                           # behind the warm-up: plain, then tiny
    assert [prompt for prompt, _ in first] == [[*b"def f("]] * 2
    assert [prompt for prompt, _ in second] == [[*b"def f(", *first[0][1]["answer"], *b"again"]] * 2


def test_a_head_without_policy(files, tmp_path):
    folder, flags = files
    (tmp_path / "head.pt").write_bytes((folder / "head.pt").read_bytes())
    with pytest.raises(UserError, match="policy-head.pt does not exist: make it with python train.py --stage ltd"):
        bench.main([*flags, "--head", f"bare={tmp_path}/head.pt", "--adaptive"])


def test_figure(files, tmp_path):
    pytest.importorskip("matplotlib")
    bench.main([*files[1], "--tree", "2,2,3", "--max-new-tokens", "6", "--limit", "1", "--temperature", "0",
                "--plot", f"{tmp_path}/b.png"])
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["b.png"]


def test_figure_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        plot.check("b.png")


@pytest.mark.parametrize("flags, message", [
    (["--max-new-tokens", "1"], "at least 2"),
    (["--max-new-tokens", "many"], "--help"),
    (["--limit", "-1"], "at least 0"),
    (["--tree", "8,5"], "three numbers"),
    (["--temperature", "-1"], "temperature"),
    (["--head", "nowhere.pt"], "nowhere.pt"),
    (["--target", "nowhere.pt"], "nowhere.pt"),
    (["--prompts", "nowhere.jsonl"], "nowhere.jsonl"),
    (["--device", "abacus"], "abacus"),
    (["--json", "no/such/folder.json"], "no/such"),
    (["--plot", "figure.abc"], "figure.abc"),
    (["--system", "be short"], "--chat"),
    (["--chat"], "no chat model"),
    (["--max-new-tokens", "500"], "context holds 256"),
    (["--shape", "llama-0b"], "llama-3.1-8b"),
])
def test_bad_input(files, flags, message):
    if "--plot" in flags:
        pytest.importorskip("matplotlib")
    with pytest.raises(UserError, match=message) as error:
        bench.main([*files[1], *flags])
    assert "\n" not in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_shape_without_a_gpu_exits_with_2():
    command = [sys.executable, "-m", "gto.bench", "--shape", "llama-3.1-8b"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).resolve().parent.parent)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "CUDA" in done.stderr
