"""On a GPU: decoding through CUDA graphs and Triton kernels says what the plain references say on a CPU."""
import json
import sys
from pathlib import Path

import pytest
import torch

import train
from gto import ltd
from gto.adaptive import AdaptiveEngine
from gto.data import prepare
from gto.diagnose import dissect
from gto.engine import Engine
from gto.policy import Space
from gto.tree import TreeShape
from gto.verify import Sampling
from tests.test_engine import Whimsical
from tests.test_train import TINY
from tests.tiny import tiny_models, tiny_prompts

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def models(device):
    target, head = tiny_models(seed=2, spread=0.2)
    head._lent = (target.embed.to(device),)
    return target.to(device), head.to(device).requires_grad_(False)


@pytest.mark.parametrize("kind", ["plain", "fixed", "adaptive"])
def test_greedy_output_is_the_cpus(kind):
    kinds = {"plain": lambda target, head: Engine(target, None, capacity=100),
             "fixed": lambda target, head: Engine(target, head, TreeShape(3, 4, 9), capacity=100),
             "adaptive": lambda target, head: AdaptiveEngine(target, head, Whimsical(), capacity=100)}
    on_cpu, on_gpu = (kinds[kind](*models(device)) for device in ("cpu", "cuda"))
    for prompt in tiny_prompts(4, seed=3):
        assert on_gpu.complete([prompt], 40) == on_cpu.complete([prompt], 40)
        assert dissect(on_gpu, prompt, 40)["tree"] == dissect(on_cpu, prompt, 40)["tree"]


def test_a_replayed_graph_draws_anew():
    engine = Engine(*models("cuda"), TreeShape(3, 4, 9), Sampling(1.0), batch=3, capacity=100)
    prompt = tiny_prompts(1)[0]
    rows = engine.complete([prompt] * 3, 40)
    assert len({tuple(row) for row in rows + engine.complete([prompt] * 3, 40)}) == 6


def test_everything_runs_on_a_gpu(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("words.txt").write_text("".join(f"def f{i}(x):\n    return x + {i}\n\n\n" for i in range(3000)))
    prepare("data", inputs=["words.txt"], vocab_size=320)
    for name, value in {"SPACES": {"cuda": Space(3, 4, (2, 5, 9))}, "TRAIN": 8, "VALIDATE": 4, "STEPS": 2048}.items():
        monkeypatch.setattr(ltd, name, value)
    for stage in [], ["--stage", "ltd"]:
        monkeypatch.setattr(sys, "argv", ["train.py", *TINY, "--data", "data", "--device", "cuda", *stage])
        train.main()
    results = json.loads(Path("out/results.json").read_text())
    assert all(results["methods"]["gto"][T]["tau"] >= 1 for T in ("T0", "T1"))
    assert "| 1 | gto | LTD |" in Path("out/ltd.md").read_text()
