"""Operations that have a Triton kernel, each beside the plain PyTorch that it must equal: see README.md."""
from functools import cache
from types import SimpleNamespace

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for macOS and Windows: plain PyTorch does the work, the decorators leave kernels alone
    triton, tl = SimpleNamespace(jit=lambda kernel: kernel), SimpleNamespace(constexpr=None)

HAS_TRITON = not isinstance(triton, SimpleNamespace)


@cache    # every operation asks
def is_modern(device: torch.device) -> bool:
    """A GPU of compute capability 8.0 (A100, RTX 30) or more: older ones emulate bfloat16, and Triton drops them."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def use_triton(x: torch.Tensor) -> bool:
    """The kernels have no backward pass: training goes through plain PyTorch."""
    return x.is_cuda and not torch.is_grad_enabled() and HAS_TRITON and is_modern(x.device)
