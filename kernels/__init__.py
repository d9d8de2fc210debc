"""The operations that have a Triton kernel. Each module holds the plain PyTorch reference (`*_reference`),
the kernel (`*_triton`) and the public function that picks one: Triton on CUDA when no gradient is needed,
the reference everywhere else."""
from functools import lru_cache
from types import SimpleNamespace

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for macOS: the references do the work, the decorators leave the kernels alone
    triton, tl = SimpleNamespace(jit=lambda kernel: kernel), SimpleNamespace(constexpr=None)


def use_triton(x: torch.Tensor) -> bool:
    """The kernels have no backward pass: training goes through the references."""
    return x.is_cuda and not torch.is_grad_enabled()


@lru_cache
def processors(device):
    """Streaming multiprocessors of a GPU: how many programs must run at once to fill it."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def next_power_of_2(n):
    """Triton's tiles have power-of-two sides; what is beyond n is masked."""
    return 1 << (n - 1).bit_length()
