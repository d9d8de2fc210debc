"""How many operations decoding launches on a GPU, counted without one: on the meta device nothing is computed, and a
Triton kernel's launch is a mark on a list. At batch size one a launch takes about as long as what it launches."""
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gto.bench.roofline import SHAPES
from gto.engine import Engine
from gto.head import DraftHead, HeadConfig
from gto.model import Prefix, Target
from gto.tree import TreeShape, candidates, expand, first_level, rerank
from kernels import acceptance, draft, fused, tree_attention

pytest.importorskip("triton")
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
    """-> a function: what a part of a cycle launches, and the part's result."""
    counting = Counting()
    launch = lambda kernel, grid: lambda *args, **options: counting.launched.update([kernel.__name__])  # noqa: E731
    monkeypatch.setattr(type(fused._rotate_kernel), "__getitem__", launch)
    for module in acceptance, draft, fused, tree_attention:
        monkeypatch.setattr(module, "use_triton", lambda x: True)

    def count(part):
        counting.launched.clear()
        with torch.inference_mode(), counting:
            result = part()
        return sum(counting.launched.values()), result, dict(counting.launched)

    return count


def engine(name, layers=8):
    config = SHAPES[name]
    head = HeadConfig(**{**vars(config), "layers": 1, "qk_norm": False}, target_dim=4096, draft_vocab_size=32000)
    with torch.device("meta"):
        target = Target(type(config)(**{**vars(config), "layers": layers})).bfloat16()
        return Engine(target, DraftHead(head, target).bfloat16(), TreeShape(10, 8, 59), capacity=4096)


@pytest.mark.parametrize("name", SHAPES)
def test_a_layer_of_the_target_is_ten_operations(name, operations):
    def verification(layers):
        each = engine(name, layers)
        tree = each.draft()
        return operations(lambda: each.verify(tree))[0]

    assert verification(9) - verification(8) <= 10


def test_drafting_launches_few_operations(operations):
    each = engine("llama-3.1-8b")
    prefix, hidden = Prefix(each.head_cache, each.length), torch.empty(1, 4096, dtype=torch.bfloat16, device="meta")
    first, level, what = operations(lambda: first_level(each.head, hidden, 10, 1.0))
    print(first, what)
    for _ in range(2):
        count, level, what = operations(lambda: expand(each.head, level, prefix, 1.0))
        print(count, what)
    root = torch.empty(1, dtype=torch.long, device="meta")
    print(operations(lambda: rerank(root, *candidates(level), each.shape))[::2])
    print(operations(each.extend)[::2])
    print(operations(each.cycle)[::2])
