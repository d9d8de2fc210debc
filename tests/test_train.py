"""Training as a program: resume, one run from nothing to text, bad input."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gto.muon import orthogonalize
from gto.trainer import train

ROOT = Path(__file__).resolve().parent.parent
TINY = ("--layers 2 --dim 32 --heads 2 --kv-heads 1 --head-dim 16 --ffn-dim 32 --head-ffn-dim 32 --length 64 --texts 64"
        " --target-steps 30 --target-batch 8 --head-steps 12 --gto-steps 2 --seeds 1 --tree 3,3,8 --groups 4 --group-size 4"
        " --eval-prompts 4 --eval-tokens 12 --vocab-size 320 --draft-vocab-size 200").split()


def run(*arguments, cwd):
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""})  # exact: on the CPU


@pytest.mark.parametrize("rows, columns", [(5, 5), (12, 4), (3, 17)])
def test_muon_makes_updates_orthogonal(rows, columns):
    torch.manual_seed(0)
    x = torch.randn(2, rows, columns)
    singular = torch.linalg.svdvals(orthogonalize(x))
    assert 0.5 < singular.min() and singular.max() < 1.3
    U, _, V = torch.linalg.svd(x, full_matrices=False)
    assert (orthogonalize(x) * (U @ V)).sum((1, 2)).min() > 0.8 * min(rows, columns), "towards the nearest such matrix"


def training(out, stop_at=None):
    """Ten steps of a small model, saved every third; with stop_at the machine 'dies' there."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    optimizers = [torch.optim.AdamW([model.weight], 0.1), torch.optim.SGD([model.bias], 0.1, momentum=0.9)]

    def loss_of(step):
        if step == stop_at:
            raise KeyboardInterrupt
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
        return model(x).square().mean(), {}

    train("job", model, optimizers, loss_of, 10, out, warmup=3, every=3)
    return model.state_dict()


def test_resume_equals_an_uninterrupted_run(tmp_path):
    expected = training(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        training(tmp_path / "b", stop_at=8)
    assert (tmp_path / "b/job.partial.pt").exists()
    found = training(tmp_path / "b")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A directory with data and a finished, tiny run."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "words.txt").write_text("".join(f"def f{i}(x):\n    return x + {i}\n\n\n" for i in range(3000)))
    prepared = run(ROOT / "prepare_data.py", "--input", "words.txt", "--out", "data/x", "--vocab-size", 320, cwd=folder)
    assert prepared.returncode == 0, prepared.stderr
    result = run(ROOT / "train.py", *TINY, "--data", "data/x", "--out-dir", "out/x", cwd=folder)
    assert result.returncode == 0, result.stderr[-2000:]
    return folder, result.stdout


def test_one_run_from_nothing(trained):
    folder, printed = trained
    assert {p.name for p in (folder / "out/x").iterdir()} == {
        "config.json", "log.jsonl", "target.pt", "text.pt", "draft.pt", "gto.pt", "control.pt", "table.md", "results.json"}
    assert "Greedy output equal to plain greedy decoding: 4 of 4 texts" in printed
    results = json.loads((folder / "out/x/results.json").read_text())
    assert set(results["methods"]) == {"ar", "draft", "control", "gto"}
    for name, by_temperature in results["methods"].items():
        for entry in by_temperature["T0"], by_temperature["T1"]:
            assert 1 <= entry["tau"] <= 5 and entry["tokens_per_second"] > 0 and entry["speedup"] > 0
            assert name == "ar" or 0 <= entry["prune_rate"] <= 1 and 0 <= entry["match_rate"] <= 1
    assert all(results["train_seconds"][name] > 0 for name in ("target", "draft", "control", "gto"))
    assert printed.strip().endswith((folder / "out/x/table.md").read_text().strip())


def test_finished_stages_are_not_run_again_and_numbers_must_not_change(trained):
    folder, _ = trained
    before = (folder / "out/x/gto.pt").stat().st_mtime_ns
    again = run(ROOT / "train.py", *TINY, "--data", "data/x", "--out-dir", "out/x", "--stage", "gto", cwd=folder)
    assert again.returncode == 0 and (folder / "out/x/gto.pt").stat().st_mtime_ns == before
    other = run(ROOT / "train.py", *TINY, "--data", "data/x", "--out-dir", "out/x", "--omega", 0.1, cwd=folder)
    assert other.returncode == 2 and "omega" in other.stderr


def test_an_interrupted_run_is_gone_on_with_only_when_asked(trained):
    folder, _ = trained
    (folder / "out/z").mkdir(parents=True)
    (folder / "out/z/draft.partial.pt").write_bytes(b"")
    result = run(ROOT / "train.py", *TINY, "--data", "data/x", "--out-dir", "out/z", cwd=folder)
    assert result.returncode == 2 and "--resume" in result.stderr and result.stderr.count("\n") == 1


DECODE = ["--out-dir", "out/x", "--tokenizer", "data/x"]


def test_decode(trained):
    folder, _ = trained
    result = run(ROOT / "decode.py", "--prompt", "def f", "--compare", "--max-new-tokens", 20, "--json", "--tree", "3,3,8",
                 *DECODE, cwd=folder)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("def f") and "the same tokens" in result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["identical"] and found["speedup"] > 0 and result.stdout.startswith("def f" + found["text"])
    assert len(found["token_ids"]) == 20 == 1 + sum(found["acceptance_lengths"])
    assert found["tau"] == pytest.approx(19 / len(found["acceptance_lengths"]))
    plain = run(ROOT / "decode.py", "--prompt", "def f", "--method", "ar", "--max-new-tokens", 20, "--json", *DECODE,
                cwd=folder)
    plain = json.loads(plain.stdout.splitlines()[-1])
    assert plain["token_ids"] == found["token_ids"] and plain["acceptance_lengths"] == [1] * 19


@pytest.mark.parametrize("temperature", [0, 1])
def test_show_tree_draws_what_decoding_does(trained, temperature):
    folder, _ = trained
    shown = run(ROOT / "decode.py", "--prompt", "def f", "--max-new-tokens", 8, "--tree", "3,3,8", "--show-tree", "--json",
                "--temperature", temperature, *DECODE, cwd=folder)
    assert shown.returncode == 0, shown.stderr
    nodes = [line for line in shown.stdout.splitlines() if "─ " in line]
    assert sum("pruned" not in line for line in nodes) == 8
    emitted = next(line for line in shown.stdout.splitlines() if line.startswith("emitted: "))
    assert f"({sum('accepted' in line for line in nodes)} drafts" in emitted
    if temperature == 0:
        assert f"({json.loads(shown.stdout.splitlines()[-1])['acceptance_lengths'][0] - 1} drafts" in emitted


@pytest.mark.parametrize("arguments, message", [
    (["decode.py", "--prompt", "", *DECODE], "prompt is empty"),
    (["decode.py", "--prompt", "x " * 500, *DECODE], "tokens, the context holds"),
    (["decode.py", "--prompt", "x", "--tree", "2,2,99", *DECODE], "99 nodes"),
    (["decode.py", "--prompt", "x", "--top-p", "7", *DECODE], "top_p"),
    (["decode.py", "--prompt", "x", "--nonsense"], "--nonsense"),
    (["decode.py", "--prompt", "x", "--target", "missing.pt"], "missing.pt does not exist"),
    (["decode.py", "--prompt", "x", "--target", "cut.pt"], "cut.pt is not a checkpoint"),
    (["decode.py", "--prompt", "x", "--target", "out/x/draft.pt"], "holds a head"),
    (["train.py", "--preset", "huge"], "no preset 'huge'"),
    (["train.py", "--nonsense", "1"], "--nonsense"),
    (["train.py", "--tree", "1,1,5", "--out-dir", "out/y", "--data", "data/x"], "5 nodes"),
    (["train.py", "--data", "empty", "--out-dir", "out/y"], "empty holds no prepared data"),
    (["train.py", "--data", "note", "--out-dir", "out/y"], "note holds no prepared data"),
])
def test_bad_input_is_one_line_and_status_2(trained, arguments, message):
    folder, _ = trained
    (folder / "cut.pt").write_bytes((folder / "out/x/target.pt").read_bytes()[:5000])
    (folder / "empty").mkdir(exist_ok=True), (folder / "note").mkdir(exist_ok=True)
    (folder / "note/note.txt").write_text("no data here")
    result = run(ROOT / arguments[0], *arguments[1:], cwd=folder)
    assert result.returncode == 2 and result.stdout == "" and not (folder / "out/y").exists()
    assert message in result.stderr and result.stderr.count("\n") == 1 and "Traceback" not in result.stderr
