"""Operations that have a Triton kernel, each beside the plain PyTorch that it must equal: see README.md."""
from types import SimpleNamespace

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for macOS: plain PyTorch does the work, the decorators leave the kernels alone
    triton, tl = SimpleNamespace(jit=lambda kernel: kernel), SimpleNamespace(constexpr=None)


def use_triton(x: torch.Tensor) -> bool:
    """The kernels have no backward pass: training goes through plain PyTorch."""
    return x.is_cuda and not torch.is_grad_enabled()
