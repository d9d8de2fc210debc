"""Training as a program: resume, one run from nothing to text, bad input."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gto.training
from gto.training import Stage, train
from kernels.muon import orthogonalize

ROOT = Path(__file__).resolve().parent.parent
TINY = ("--layers 2 --dim 32 --heads 2 --kv-heads 1 --head-dim 16 --ffn-dim 32 --head-ffn-dim 32 --length 64 --texts 64"
        " --target-steps 30 --target-batch 8 --head-steps 12 --gto-steps 2 --seeds 1 --tree 3,3,8 --groups 4"
        " --group-size 4"
        " --eval-prompts 4 --eval-tokens 12 --vocab-size 320 --draft-vocab-size 200").split()


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


def run_of_ten(out, stop_at=None):
    """Ten steps of a small model, saved every third; with stop_at the machine 'dies' there."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    optimizers = [torch.optim.AdamW([model.weight], 0.1), torch.optim.SGD([model.bias], 0.1, momentum=0.9)]

    def loss_of(step):
        if step == stop_at:
            raise KeyboardInterrupt
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
        return model(x).square().mean(), {}

    train(Stage("job", 10, 5), model, optimizers, loss_of, out, warmup=3)
    return model.state_dict()


def test_resume_equals_an_uninterrupted_run(tmp_path, monkeypatch):
    monkeypatch.setattr(gto.training, "SAVE_EVERY", 3)
    expected = run_of_ten(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        run_of_ten(tmp_path / "b", stop_at=8)
    assert (tmp_path / "b/job.partial.pt").exists()
    found = run_of_ten(tmp_path / "b")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A directory with data and a finished, tiny run."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "words.txt").write_text("".join(f"def f{i}(x):\n    return x + {i}\n\n\n" for i in range(3000)))
    prepared = run(ROOT / "prepare_data.py", "--input", "words.txt", "--out", "data/x", "--vocab-size", 320, cwd=folder)
    assert prepared.returncode == 0, prepared.stderr
    result = run("-c", WATCH_WINGS, ROOT / "train.py", *TINY, "--data", "data/x", "--out-dir", "out/x", cwd=folder)
    assert result.returncode == 0, result.stderr[-2000:]
    return folder, result.stdout


def test_one_run_from_nothing(trained):
    folder, printed = trained
    assert {p.name for p in (folder / "out/x").iterdir()} == {
        "config.json", "log.jsonl", "target.pt", "text.pt", "draft.pt", "gto.pt", "control.pt", "table.md",
        "results.json", "report.html", "tokenizer.model", "meta.json", "prompts.jsonl"}
    assert "Greedy output equal to plain greedy decoding: 4 of 4 texts" in printed
    results = json.loads((folder / "out/x/results.json").read_text())
    rows = {(row["T"], row["method"]): row for row in results["rows"]}
    assert set(rows) == {(T, name) for T in "01" for name in ("ar", "draft", "control", "gto")}
    for (_, name), row in rows.items():
        assert 1 <= row["tau"] <= 5 and row["tokens/s"] > 0 and row["speed-up"] > 0
        assert name == "ar" or row["path pruned"].endswith("%") and len(row["by seed"]) == 1
    log = [json.loads(line) for line in (folder / "out/x/log.jsonl").read_text().splitlines()]
    finished = {line["stage"]: line for line in log if line.get("finished")}
    assert set(finished) == {"target", "draft", "control", "gto"}
    assert printed.strip().endswith((folder / "out/x/table.md").read_text().strip())


def test_finished_stages_are_not_run_again_and_numbers_must_not_change(trained):
    folder, _ = trained
    before = (folder / "out/x/gto.pt").stat().st_mtime_ns
    again = run(ROOT / "train.py", *TINY, "--data", "data/x", "--out-dir", "out/x", "--stage", "gto", cwd=folder)
    assert again.returncode == 0 and (folder / "out/x/gto.pt").stat().st_mtime_ns == before
    other = run(ROOT / "train.py", *TINY, "--data", "data/x", "--out-dir", "out/x", "--omega", 0.1, cwd=folder)
    assert other.returncode == 2 and "omega" in other.stderr


def test_an_interrupted_run_goes_on(trained):
    """What dies in the middle of phase I ends with the head of the uninterrupted run, bit for bit."""
    folder, _ = trained
    (folder / "out/z").mkdir(parents=True)
    for name in ("target.pt", "text.pt"):
        (folder / "out/z" / name).write_bytes((folder / "out/x" / name).read_bytes())
    dies = ("import sys, gto.training as t; sys.argv = sys.argv[1:]; t.SAVE_EVERY = 5; sample = t.sample_batch\n"
            "def die(part, *a):\n    assert part < 8\n    return sample(part, *a)\n"
            "t.sample_batch = die; import train; train.main()")
    arguments = *TINY, "--data", "data/x", "--out-dir", "out/z", "--stage", "draft"
    assert run("-c", dies, ROOT / "train.py", *arguments, cwd=folder).returncode == 1
    assert (folder / "out/z/draft.partial.pt").exists() and not (folder / "out/z/draft.pt").exists()
    assert run(ROOT / "train.py", *arguments, cwd=folder).returncode == 0
    assert not (folder / "out/z/draft.partial.pt").exists()
    found, expected = (torch.load(folder / f"out/{x}/draft.pt", weights_only=True)["model"] for x in "zx")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


DECODE = ["--out-dir", "out/x"]        # the run's folder carries its tokenizer


def test_decode(trained):
    folder, _ = trained
    result = run("-c", WATCH_WINGS, ROOT / "decode.py", "--prompt", "def f", "--compare", "--max-new-tokens", 20,
                 "--json", "--tree", "3,3,8", *DECODE, cwd=folder)
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
    shown = run(ROOT / "decode.py", "--prompt", "def f", "--max-new-tokens", 8, "--tree", "3,3,8", "--show-tree",
                "--report", "page.html", "--json", "--temperature", temperature, *DECODE, cwd=folder)
    assert shown.returncode == 0 and "</html>" in (folder / "page.html").read_text(encoding="utf-8"), shown.stderr
    nodes = [line for line in shown.stdout.splitlines() if "─ " in line]
    assert sum("pruned" not in line for line in nodes) == 8
    emitted = next(line for line in shown.stdout.splitlines() if line.startswith("emitted: "))
    assert f"({sum('accepted' in line for line in nodes)} drafts" in emitted
    assert f"({json.loads(shown.stdout.splitlines()[-1])['acceptance_lengths'][0] - 1} drafts" in emitted
