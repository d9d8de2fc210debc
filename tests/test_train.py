"""Training as a program: resume, one run from nothing to text, bad input."""
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import decode
import gto.training
import prepare_data
import train as train_py
from gto.checkpoint import read, seconds_of
from gto.config import Config
from gto.loss import gto_objective
from gto.model import ModelConfig
from gto.training import Stage, Texts, copy_of, train, train_head
from gto.util import UserError, main_guard
from kernels.muon import orthogonalize
from tests.tiny import run_here, tiny_models

ROOT = Path(__file__).resolve().parent.parent
TINY = ("--layers 2 --dim 32 --heads 2 --kv-heads 1 --head-dim 16 --ffn-dim 32 --head-ffn-dim 32 --length 64 --texts 64"
        " --target-steps 30 --target-batch 8 --head-steps 12 --gto-steps 6 --rollout-steps 2 --seeds 1 --tree 3,3,8"
        " --groups 4 --group-size 4 --eval-prompts 4 --eval-tokens 8 --vocab-size 320 --draft-vocab-size 200").split()


def run(*arguments, cwd):
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""})  # exact: on the CPU


# Runs a program as `python program ...` would, and fails if it imported one of the wings.
WATCH_WINGS = """import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
assert not [m for m in sys.modules if m.startswith(("gto.ltd", "gto.bench", "gto.released"))]"""


@pytest.mark.parametrize("rows, columns", [(5, 5), (12, 4), (3, 17)])
def test_muon_makes_updates_orthogonal(rows, columns):
    torch.manual_seed(0)
    x = torch.randn(2, rows, columns)
    singular = torch.linalg.svdvals(orthogonalize(x))
    assert 0.5 < singular.min() and singular.max() < 1.3
    U, _, V = torch.linalg.svd(x, full_matrices=False)
    assert (orthogonalize(x) * (U @ V)).sum((1, 2)).min() > 0.8 * min(rows, columns), "towards the nearest such matrix"


def tensors(path):
    contents = torch.load(path, weights_only=True)
    return {name: x for name, x in contents.get("model", contents).items() if isinstance(x, torch.Tensor)}


def same(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], x) for name, x in expected.items())


def run_of_25(out, happens={}):
    """25 steps of a small model, saved every tenth; happens: {step: what is done to the model in it}."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    model.config = ModelConfig()
    optimizers = [torch.optim.AdamW([model.weight], 0.1), torch.optim.SGD([model.bias], 0.1, momentum=0.9)]

    def loss_of(step):
        happens.get(step, id)(model)
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
        return model(x).square().mean(), {}

    train(Stage("job", 25, 5), model, optimizers, loss_of, out, warmup=3)
    return model.state_dict()


def stop(_):
    raise KeyboardInterrupt


def spoil_bias(model):
    model.bias.data[1] = torch.inf


def spoil_gradient(model):
    model.weight.register_hook(lambda gradient: gradient * torch.nan)


@pytest.mark.parametrize("step, happens, error, message", [
    (23, stop, KeyboardInterrupt, None),
    (17, spoil_bias, UserError, "^job, step 18: .*finite.*kept.*--head-lr"),
    (24, spoil_gradient, UserError, "^job, step 25: ")], ids=["stopped", "loss", "weights"])
def test_resume_equals_an_uninterrupted_run(tmp_path, monkeypatch, step, happens, error, message):
    """Also after a loss, or the last step's weights, that are no numbers: they stop it, and are never saved."""
    monkeypatch.setattr(gto.training, "SAVE_EVERY", 10)
    expected = run_of_25(tmp_path / "a")
    with pytest.raises(error, match=message) as caught:
        run_of_25(tmp_path / "b", {step: happens})
    partial = read(tmp_path / "b/job.partial.pt", "training")
    assert partial["step"] == step // 10 * 10 and "\n" not in str(caught.value)
    assert all(x.isfinite().all() for x in partial["model"].values()) and not (tmp_path / "b/job.pt").exists()
    assert same(run_of_25(tmp_path / "b"), expected)


def test_resumed_rollouts_equal_uninterrupted_ones(tmp_path, monkeypatch):
    """Phase II, two parts a step, whose trees serve two steps: stopped between and within rollouts."""
    monkeypatch.setattr(gto.training, "SAVE_EVERY", 2)
    target, head = tiny_models(seed=5)
    config = Config(tree="3,3,8", groups=2, group_size=4, unroll=2, rollout_steps=2, accumulate=2, head_muon_lr=0.0)
    texts, rollouts = torch.randint(29, (9, 24), generator=torch.Generator().manual_seed(0)), []

    def phase_two(out, last=99):
        def objective(batch):
            rollouts.append(not batch.kept)
            return (gto_objective if len(rollouts) <= last else stop)(batch)

        rollouts.clear()
        student = copy_of(head, target)
        train_head(Stage("gto", 5, 2), config, target, student, Texts(texts, texts >= 0, []), out, objective, head)
        return student.state_dict()

    expected, new = phase_two(tmp_path / "a"), [True, True, False, False]
    assert rollouts == [*new, *new, True, True]
    for stopped, last in enumerate((5, 7), 1):                     # in the third step's second part, the fourth's
        with pytest.raises(KeyboardInterrupt):
            phase_two(tmp_path / "b", last - 4 * (stopped - 1))
    assert same(phase_two(tmp_path / "b"), expected) and rollouts == [*new, True, True]
    assert not any(torch.equal(expected[name], x) for name, x in head.state_dict().items() if "weight" in name)


# Two ranks, which part when what takes seconds to import is there; the first one tells how the second one ends.
RANKS = """import torch._dynamo                              # which optimizers import
from torch import distributed
from tests.test_train import *
gto.training.SAVE_EVERY, out, rank = 10, sys.argv[1], int(os.fork() == 0)
distributed.init_process_group("gloo", store=distributed.FileStore(out + "/store", 2), rank=rank, world_size=2)
try:
    main_guard(lambda: run_of_25(out, {17: spoil_bias} if rank == 1 else {}))
finally:
    print(os.waitstatus_to_exitcode(os.wait()[1]) if rank == 0 else "")"""


def test_all_ranks_stop_at_a_loss_that_is_no_number(tmp_path):
    result = run("-c", RANKS, tmp_path, cwd=ROOT)
    assert result.returncode == 2 and result.stdout.split() == ["2"], result.stderr
    assert result.stderr.count("error: job, step 18: ") == 2
    assert read(tmp_path / "job.partial.pt", "training")["step"] == 10


@pytest.mark.parametrize("name", ["filler", "job.partial.pt.tmp", "log.jsonl"])
def test_a_full_disk(tmp_path, monkeypatch, capsys, name):
    """A small disk that is filled up, where we may mount one; elsewhere a file that takes nothing."""
    monkeypatch.setattr(gto.training, "SAVE_EVERY", 10)
    out = tmp_path / "out"
    out.mkdir()
    if name == "filler" and os.system(f"mount -t tmpfs -o size=64k tmpfs {out} 2>/dev/null"):
        pytest.skip("mounting is not permitted")

    def fill(_):
        (out / name).unlink(missing_ok=True)
        if name != "filler":
            return (out / name).symlink_to("/dev/full")
        with suppress(OSError):
            (out / name).write_bytes(bytes(1 << 20))

    try:
        with pytest.raises(SystemExit, match="^2$"):
            main_guard(lambda: run_of_25(out, {17: fill}))
        *_, last = capsys.readouterr().err.splitlines()
        assert last.startswith("error: ") and "No space left on device" in last
        assert read(out / "job.partial.pt", "training")["step"] == 10 and not list(out.glob("*.tmp"))
        (out / name).unlink(missing_ok=True)
        assert same(run_of_25(out), run_of_25(tmp_path / "b"))
    finally:
        os.system(f"umount {out} 2>/dev/null")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A directory with data and a finished, tiny run."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "words.txt").write_text("".join(f"def f{i}(x):\n    return x + {i}\n\n\n" for i in range(3000)))
    run_here(prepare_data, "--input", "words.txt", "--out", "data/x", "--vocab-size", 320, cwd=folder, device=())
    result = run("-c", WATCH_WINGS, ROOT / "train.py", *TINY, "--data", "data/x", "--out-dir", "out/x", cwd=folder)
    assert result.returncode == 0, result.stderr[-2000:]
    return folder, result.stdout


def test_one_run_from_nothing(trained):
    folder, printed = trained
    assert {p.name for p in (folder / "out/x").iterdir()} == {
        "config.json", "log.jsonl", "target.pt", "text.pt", "draft.pt", "gto.pt", "keep.pt", "control.pt", "table.md",
        "results.json", "report.html", "tokenizer.model", "meta.json", "prompts.jsonl", "costs.json"}
    assert "Greedy output equal to plain greedy decoding: 4 of 4 texts" in printed
    results = json.loads((folder / "out/x/results.json").read_text())
    rows = {(row["T"], row["method"]): row for row in results["rows"]}
    assert set(rows) == {(T, name) for T in "01" for name in ("ar", "draft", "control", "gto", "keep")}
    for (_, name), row in rows.items():
        assert 1 <= row["tau"] <= 5 and row["tokens/s"] > 0 and row["speed-up"] > 0
        assert name == "ar" or row["path pruned"].endswith("%") and len(row["by seed"]) == 1
    log = [json.loads(line) for line in (folder / "out/x/log.jsonl").read_text().splitlines()]
    finished = {line["stage"]: line for line in log if line.get("finished")}
    assert set(finished) == {"target", "draft", "control", "gto", "keep"}
    assert set(results["differences"]) == {"control - draft", *(f"{a} - {b}" for a in ("gto", "keep")
                                                                for b in ("draft", "control"))}
    assert printed.strip().endswith((folder / "out/x/table.md").read_text().strip())


def test_finished_stages_are_not_run_again_and_numbers_must_not_change(trained):
    folder, _ = trained
    before = (folder / "out/x/gto.pt").stat().st_mtime_ns
    run_here(train_py, *TINY, "--data", "data/x", "--out-dir", "out/x", "--stage", "gto", cwd=folder)
    assert (folder / "out/x/gto.pt").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="omega"):
        run_here(train_py, *TINY, "--data", "data/x", "--out-dir", "out/x", "--omega", 0.1, cwd=folder)


KILLING = """import os, random, signal, sys, time
import gto.training, torch._dynamo, train                      # what optimizers import: once, instead of in every child
from gto.util import main_guard
kills, longest, *sys.argv[1:] = sys.argv[1:]
gto.training.SAVE_EVERY, seconds_of, randomness, runs = 4, train.seconds_of, random.Random(0), 0
train.seconds_of = lambda out, name: seconds_of("out/x", name)     # of which the control takes its number of steps
left = int(kills)
while left:
    runs, status = runs + 1, signal.SIGKILL
    sys.argv[-1] = f"out/killed-{kills}-{runs}"
    while status == signal.SIGKILL:
        if not (child := os.fork()):
            os._exit(main_guard(train.main) or 0)
        if left:
            time.sleep(randomness.uniform(0, float(longest)))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        left -= status == signal.SIGKILL
    if status:
        sys.exit(f"status {status}")
print("runs:", runs)"""


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.soak)])
def test_killed_runs_go_on(trained, kills):
    """kill -9 at random moments of runs from nothing to the table: all end as the uninterrupted one, bit for bit."""
    folder, _ = trained

    def taus(out):
        return [row["tau"] for row in json.loads((out / "results.json").read_text())["rows"]]

    first, last = ((folder / "out/x" / name).stat().st_mtime for name in ("target.pt", "table.md"))
    longest = seconds_of(folder / "out/x", "target") + last - first
    result = run("-c", KILLING, kills, longest, *TINY, "--data", "data/x", "--out-dir", "", cwd=folder)
    assert result.returncode == 0, result.stderr[-2000:]
    for number in range(int(result.stdout.split()[-1])):
        out = folder / f"out/killed-{kills}-{number + 1}"
        for name in "target", "text", "draft", "gto", "keep", "control":
            assert same(tensors(out / f"{name}.pt"), tensors(folder / f"out/x/{name}.pt")), (out, name)
        assert taus(out) == taus(folder / "out/x")


@pytest.fixture
def decode_here(trained, capsys):
    """decode_here(flags) -> what decode.py prints. The run's folder carries its tokenizer."""
    def decoded(*arguments):
        capsys.readouterr()
        run_here(decode, "--prompt", "def f", *arguments, "--out-dir", "out/x", cwd=trained[0])
        return capsys.readouterr().out

    return decoded


def test_the_seed_decides(trained, decode_here):
    """Another seed, another target and text; with the same one, killed runs above end like the first."""
    folder, _ = trained
    run_here(train_py, *TINY, "--data", "data/x", "--out-dir", "out/7", "--seed", 7, "--stage", "text", cwd=folder)
    assert not any(same(tensors(folder / f"out/7/{name}.pt"), tensors(folder / f"out/x/{name}.pt"))
                   for name in ("target", "text"))
    texts = [decode_here("--temperature", 1, "--seed", seed) for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]


def test_decode(trained, decode_here):
    result = run("-c", WATCH_WINGS, ROOT / "decode.py", "--prompt", "def f", "--compare", "--max-new-tokens", 20,
                 "--json", "--tree", "3,3,8", "--out-dir", "out/x", cwd=trained[0])
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("def f") and "the same tokens" in result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["identical"] and found["speedup"] > 0 and result.stdout.startswith("def f" + found["text"])
    assert len(found["token_ids"]) == 20 == 1 + sum(found["acceptance_lengths"])
    assert found["tau"] == pytest.approx(19 / len(found["acceptance_lengths"]))
    plain = json.loads(decode_here("--method", "ar", "--max-new-tokens", 20, "--json").splitlines()[-1])
    assert plain["token_ids"] == found["token_ids"] and plain["acceptance_lengths"] == [1] * 19


@pytest.mark.parametrize("temperature", [0, 1])
def test_show_tree_draws_what_decoding_does(trained, decode_here, temperature):
    shown = decode_here("--max-new-tokens", 8, "--tree", "3,3,8", "--show-tree", "--report", "page.html", "--json",
                        "--temperature", temperature).splitlines()
    assert "</html>" in (trained[0] / "page.html").read_text(encoding="utf-8")
    nodes = [line for line in shown if "─ " in line]
    assert sum("pruned" not in line for line in nodes) == 8
    emitted = next(line for line in shown if line.startswith("emitted: "))
    assert f"({sum('accepted' in line for line in nodes)} drafts" in emitted
    assert f"({json.loads(shown[-1])['acceptance_lengths'][0] - 1} drafts" in emitted
