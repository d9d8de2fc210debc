"""Training as a program: resume, one run from nothing to text, bad input."""
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
                          env={**os.environ, "PYTHONPATH": str(ROOT)})


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
    result = run(ROOT / "train.py", *TINY, "--data", "data/x", "--out", "out/x", cwd=folder)
    assert result.returncode == 0, result.stderr[-2000:]
    return folder, result.stdout


def test_one_run_from_nothing(trained):
    folder, printed = trained
    assert {p.name for p in (folder / "out/x").iterdir()} == {
        "config.json", "log.jsonl", "target.pt", "text.pt", "head.pt", "gto-1337.pt", "control-1337.pt", "table.md"}
    assert "Greedy output equal to plain greedy decoding: 12 of 12 runs" in printed
    assert printed.strip().endswith((folder / "out/x/table.md").read_text().strip())


def test_finished_stages_are_not_run_again_and_numbers_must_not_change(trained):
    folder, _ = trained
    before = (folder / "out/x/gto-1337.pt").stat().st_mtime_ns
    again = run(ROOT / "train.py", *TINY, "--data", "data/x", "--out", "out/x", "--stage", "gto", cwd=folder)
    assert again.returncode == 0 and (folder / "out/x/gto-1337.pt").stat().st_mtime_ns == before
    other = run(ROOT / "train.py", *TINY, "--data", "data/x", "--out", "out/x", "--omega", 0.1, cwd=folder)
    assert other.returncode == 2 and "omega" in other.stderr


DECODE = ["--target", "out/x/target.pt", "--head", "out/x/gto-1337.pt", "--tokenizer", "data/x"]


def test_decode(trained):
    folder, _ = trained
    result = run(ROOT / "decode.py", "--prompt", "def f", "--compare", "--max-new-tokens", 20, *DECODE, cwd=folder)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("def f") and "the same tokens" in result.stderr
    plain = run(ROOT / "decode.py", "--prompt", "def f", "--tree", "1,1,1", "--max-new-tokens", 20, *DECODE, cwd=folder)
    assert plain.stdout == result.stdout


@pytest.mark.parametrize("arguments, message", [
    (["decode.py", "--prompt", "", *DECODE], "prompt is empty"),
    (["decode.py", "--prompt", "x " * 500, *DECODE], "tokens, the context holds"),
    (["decode.py", "--prompt", "x", "--tree", "2,2,99", *DECODE], "99 nodes"),
    (["decode.py", "--prompt", "x", "--top-p", "7", *DECODE], "top_p"),
    (["decode.py", "--prompt", "x", "--nonsense"], "--nonsense"),
    (["decode.py", "--prompt", "x", "--target", "missing.pt"], "missing.pt does not exist"),
    (["decode.py", "--prompt", "x", "--target", "cut.pt"], "cut.pt is not a checkpoint"),
    (["decode.py", "--prompt", "x", "--target", "out/x/head.pt"], "holds a head"),
    (["train.py", "--preset", "huge"], "no preset 'huge'"),
    (["train.py", "--nonsense", "1"], "--nonsense"),
    (["train.py", "--tree", "1,1,5", "--out", "out/y", "--data", "data/x"], "5 nodes"),
    (["train.py", "--data", "empty", "--out", "out/y"], "empty"),
])
def test_bad_input_is_one_line_and_status_2(trained, arguments, message):
    folder, _ = trained
    (folder / "cut.pt").write_bytes((folder / "out/x/target.pt").read_bytes()[:5000])
    (folder / "empty").mkdir(exist_ok=True)
    (folder / "empty/note.txt").write_text("no data here")
    result = run(ROOT / arguments[0], *arguments[1:], cwd=folder)
    assert result.returncode == 2
    assert message in result.stderr and result.stderr.count("\n") == 1 and "Traceback" not in result.stderr
