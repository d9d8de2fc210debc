"""How many operations decoding launches on a GPU, counted without one: on the meta device nothing is computed, and a
Triton kernel's launch is a mark on a list. At batch size one a launch takes about as long as what it launches."""
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gto.engine import Engine
from gto.head import DraftHead, HeadConfig
from gto.model import ModelConfig, Prefix, Target
from gto.tree import TreeShape, candidates, expand, rerank
from kernels import acceptance, fused, tree_attention

pytest.importorskip("triton")
SHAPES = {
    "llama-3.1-8b": ModelConfig(128256, 32, 4096, 32, 8, 128, 14336, 131072, 1e-5, 5e5, (8.0, 1.0, 4.0, 8192), False),
    "qwen3-8b": ModelConfig(151936, 36, 4096, 32, 8, 128, 12288, 40960, 1e-6, 1e6, tied=False, qk_norm=True)}
ALLOCATIONS = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "_unsafe_view"}


class Counting(TorchDispatchMode):
    """Counts what is launched, by name: neither views nor allocations."""

    def __init__(self):
        super().__init__()
        self.launched = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        is_view = any(result.alias_info and not result.alias_info.is_write for result in func._schema.returns)
        if not is_view and name not in ALLOCATIONS:
            self.launched[name] += 1
        return func(*args, **kwargs or {})


@pytest.fixture
def operations(monkeypatch):
    """-> a function: how many operations a part of a cycle launches, and its result."""
    counting = Counting()
    monkeypatch.setattr(type(fused._rotate_kernel), "__getitem__", lambda kernel, grid:
                        lambda *args, **options: counting.launched.update([kernel.__name__]))
    for module in acceptance, fused, tree_attention:
        monkeypatch.setattr(module, "use_triton", lambda x: True)

    def count(part):
        counting.launched.clear()
        with torch.no_grad(), counting:
            result = part()
        print(dict(counting.launched))                                 # what pytest shows where a number is too large
        return counting.launched.total(), result

    return count


def engine(name, layers=8):
    config = SHAPES[name]
    head_config = HeadConfig(**{**vars(config), "layers": 1, "qk_norm": False}, target_dim=4096, draft_vocab_size=32000)
    with torch.device("meta"):
        target = Target(replace(config, layers=layers)).bfloat16()
        return Engine(target, DraftHead(head_config, target).bfloat16(), TreeShape(10, 8, 59), capacity=4096)


def test_views_and_allocations_are_not_counted(operations):
    x = torch.empty(2, 3, device="meta")
    assert operations(lambda: (x.T.new_empty(3).expand(2, 3), x[0], x.view(6), x.reshape(6)))[0] == 0
    assert operations(lambda: x.T.reshape(6) + torch.zeros(6, device="meta"))[0] == 3


@pytest.mark.parametrize("name", SHAPES)
def test_the_target(name, operations):
    def verification(layers):
        each = engine(name, layers)
        _, tree = operations(each.draft)
        return operations(lambda: each.verify(tree))[0]

    layer = verification(9) - verification(8)
    assert layer <= 11 and verification(8) - 8 * layer <= 46


def test_drafting(operations):
    each = engine("llama-3.1-8b")
    count, (root, drafted) = operations(each.begin)                # the head over the new tokens, the first level
    assert count <= 39
    prefix = Prefix(each.head_cache, each.length)
    for _ in range(3):
        count, drafted = operations(lambda: expand(each.head, drafted, prefix, 1.0))
        assert count <= 25
    assert operations(lambda: rerank(root, *candidates(drafted), each.shape))[0] <= 30
