"""The operations that have a Triton kernel. Each module holds the plain PyTorch reference (`*_reference`),
the kernel (`*_triton`) and the public function that picks one: Triton on CUDA when no gradient is needed,
the reference everywhere else."""
import torch


def use_triton(x: torch.Tensor) -> bool:
    """The kernels have no backward pass: training goes through the references."""
    return x.is_cuda and not torch.is_grad_enabled()
