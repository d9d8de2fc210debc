"""The element-wise steps of a decoder layer, each one kernel instead of three to eight."""
import torch

from kernels import use_triton


def add_rms_norm(x, delta, weight, eps):
    """Residual addition and RMSNorm of the sum.

    x [..., C]; delta [..., C] or None; weight [C]. Returns (x + delta, norm(x + delta) * weight), both in x's dtype.
    """
    run = add_rms_norm_triton if use_triton(x) else add_rms_norm_reference
    return run(x, delta, weight, eps)


def add_rms_norm_reference(x, delta, weight, eps):
    x = x if delta is None else x + delta
    return x, torch.nn.functional.rms_norm(x, weight.shape, weight, eps)


def rotate(x, cos, sin):
    """Rotary positions, half-split form: x * cos + [-x2, x1] * sin.

    x [B, N, H, D]; cos, sin [B, N, D/2] float32. Returns x's dtype.
    """
    run = rotate_triton if use_triton(x) else rotate_reference
    return run(x, cos, sin)


def rotate_reference(x, cos, sin):
    cos, sin = cos[:, :, None], sin[:, :, None]                                       # [B, N, 1, D/2]
    x1, x2 = x.float().chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1).to(x.dtype)


def silu_mul(gate_up):
    """SwiGLU's element-wise part: gate_up [..., 2F] -> silu(gate) * up [..., F]."""
    run = silu_mul_triton if use_triton(gate_up) else silu_mul_reference
    return run(gate_up)


def silu_mul_reference(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up
