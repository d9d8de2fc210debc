"""On a GPU: decoding through CUDA graphs and Triton kernels says what the plain references say on a CPU."""
import json
import sys
from pathlib import Path

import pytest
import torch

import gto.ltd.ppo
import gto.policy
import kernels
import train
from gto.data import prepare
from gto.engine import Engine
from gto.evaluate import timed
from gto.ltd import __main__ as ltd
from gto.policy import AdaptiveEngine, Space
from gto.tree import TreeShape
from gto.verify import Sampling
from tests.test_ltd import Whimsical
from tests.test_train import TINY
from tests.tiny import tiny_models, tiny_prompts

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def models(device):
    target, head = tiny_models(seed=2, spread=0.2)
    head._lent = (target.embed.to(device),)
    return target.to(device), head.to(device).requires_grad_(False)


@pytest.mark.parametrize("triton", [True, False])
@pytest.mark.parametrize("kind", ["plain", "fixed", "adaptive"])
def test_greedy_output_is_the_cpus(kind, triton, monkeypatch):
    """Also where the plain references are captured."""
    monkeypatch.setattr(kernels, "HAS_TRITON", triton)
    kinds = {"plain": lambda target, head: Engine(target, None, capacity=100),
             "fixed": lambda target, head: Engine(target, head, TreeShape(3, 4, 9), capacity=100),
             "adaptive": lambda target, head: AdaptiveEngine(target, head, Whimsical(), capacity=100)}
    on_cpu, on_gpu = (kinds[kind](*models(device)) for device in ("cpu", "cuda"))
    for prompt in tiny_prompts(4, seed=3):
        assert on_gpu.complete([prompt], 40) == on_cpu.complete([prompt], 40)
        assert timed(on_gpu, prompt, 40).cycles == timed(on_cpu, prompt, 40).cycles


def test_a_replayed_graph_draws_anew():
    engine = Engine(*models("cuda"), TreeShape(3, 4, 9), Sampling(1.0), batch=3, capacity=100)
    prompt = tiny_prompts(1)[0]
    rows = engine.complete([prompt] * 3, 40)
    assert len({tuple(row) for row in rows + engine.complete([prompt] * 3, 40)}) == 6


def test_everything_runs_on_a_gpu(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("words.txt").write_text("".join(f"def f{i}(x):\n    return x + {i}\n\n\n" for i in range(3000)))
    prepare("data", inputs=["words.txt"], vocab_size=320)
    monkeypatch.setattr(gto.policy, "SPACES", {"cuda": Space(3, 4, (0, 2, 5, 9))})
    monkeypatch.setattr(ltd, "CHILDREN", (3,))
    monkeypatch.setattr(gto.ltd.ppo, "UPDATES", 1)
    monkeypatch.setattr(sys, "argv", ["train.py", *TINY, "--data", "data", "--device", "cuda"])
    train.main()
    results = json.loads(Path("out/results.json").read_text())
    assert len(results["rows"]) == 8 and all(row["tau"] >= 1 for row in results["rows"])
    monkeypatch.setattr(sys, "argv", ["gto.ltd", "--device", "cuda"])
    ltd.main()
    assert "| out/gto.pt | 1 | LTD |" in Path("out/ltd.md").read_text()
