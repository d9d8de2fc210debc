"""Exercise 6: acceptance scoring with a kernel launch less.

A kernel's launch takes some microseconds, which is as long as a small kernel runs. `score_nodes_triton`, as phase II
calls it, has three: scan the logits, choose after every node, look up the log-probability of every node's token. (In
decoding, which asks for choices only, there are two.) The last two need only the few numbers that the first has left,
and nothing of each other. So they could run side by side, in one launch of B * N + B * M programs: the first B * N
choose, the others look up.

Change   `score_nodes_triton` and its kernels in kernels/acceptance.py: two launches, with and without tokens, and no
         work left to PyTorch. Results stay the reference's, at T=0 and T>0, for any N and M
Size     about 25 lines
Hint     a @triton.jit function may call others: make two of today's kernels functions of a row or a node, and call them
         from a new kernel that decides which. Whether a pointer is None is known when a kernel is compiled, what
         `tl.program_id(0)` is, only when it runs. A crash of Python is an index out of bounds
Run      python -m pytest -m exercise tests/exercises/test_6_kernel.py, then tests/test_kernels.py, and
         tests/test_compile.py, which compiles all kernels for real GPUs
Then     on a GPU: python -m kernels.bench, before and after"""
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import acceptance
from kernels.acceptance import score_nodes_triton
from tests.exercises.task import todo
from tests.test_kernels import DEVICE, assert_close, assert_inverse_cdf, plain_scoring, scoring_inputs

pytest.importorskip("triton")
pytestmark = pytest.mark.exercise
FREE = {"empty", "empty_like", "new_empty", "unbind", "select", "slice", "view", "reshape", "expand", "as_strided",
        "detach", "alias"}


class Count(TorchDispatchMode):
    """What PyTorch would launch on a GPU: operations other than making room for a tensor and looking at a part."""
    launches = 0

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        self.launches += operation.overloadpacket.__name__ not in FREE
        return operation(*arguments, **options or {})


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("with_tokens", [False, True])
def test_two_launches(temperature, with_tokens, monkeypatch):
    launched = []

    def launch(kernel, grid):
        """Only count: the kernel does not run."""
        return lambda *arguments, **options: launched.append(kernel.__name__)

    logits, tokens, parents, uniform = scoring_inputs(2, 7, 500, masked=130, dtype=torch.float32)
    monkeypatch.setattr(type(acceptance._scan_kernel), "__getitem__", launch)
    with Count() as torch_operations:
        score_nodes_triton(logits, *((tokens, parents) if with_tokens else (None, None)), temperature, uniform)
    if len(launched) > 2:
        todo(f"score_nodes_triton still launches {len(launched)} kernels, {', '.join(launched)}")
    assert len(launched) == 2, launched
    assert torch_operations.launches == 0, "PyTorch's operations are launches, too"


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("B, N, M, chunk", [(1, 1, 1, 64), (3, 5, 11, 64), (2, 9, 3, 64), (2, 7, 7, 512)])
@torch.no_grad()
def test_same_results(B, N, M, chunk, temperature, monkeypatch):
    """The guard while you work, passing today: more, fewer and as many nodes as rows of logits; eight chunks, of which
    some are masked out, or one."""
    torch.manual_seed(N)
    monkeypatch.setattr(acceptance, "CHUNK", chunk)
    logits, _, _, uniform = scoring_inputs(B, N, 500, masked=130, dtype=torch.float32)
    tokens, parents = torch.randint(370, (B, M), device=DEVICE), torch.randint(N, (B, M), device=DEVICE)
    choice, log_prob = score_nodes_triton(logits, tokens, parents, temperature, uniform)
    want, want_log_prob = plain_scoring(logits.double(), tokens, parents, temperature, uniform)
    assert_close(log_prob, want_log_prob, 1e-5)
    if temperature == 0:
        assert torch.equal(choice, want)
    else:
        assert_inverse_cdf(logits, temperature, uniform, choice)
    alone, none = score_nodes_triton(logits, None, None, temperature, uniform)
    assert torch.equal(alone, choice) and none is None
