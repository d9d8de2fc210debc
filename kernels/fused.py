"""The element-wise steps of a decoder layer, each one kernel instead of three to eight.

Decoding one token runs hundreds of kernels that each last about as long as it takes to start one: here fewer kernels
are faster, whatever they do. Every kernel reads its input once and computes in float32."""
import torch

from kernels import tl, triton, use_triton


def add_rms_norm(x, delta, weight, eps):
    """x, delta (or None) [..., C], weight [C] -> the sum x + delta and its RMSNorm times weight, both in x's dtype."""
    if not use_triton(x):
        x = x if delta is None else x + delta
        return x, torch.nn.functional.rms_norm(x, weight.shape, weight, eps)
    total, out = x if delta is None else x.new_empty(x.shape), x.new_empty(x.shape)
    launch_norm(x.contiguous(), None, None if delta is None else delta.contiguous(), weight, total, out, eps)
    return total, out


def embed_norm_cat(tokens, table, token_weight, hidden, weight, eps):
    """A draft head's input: the normed embeddings beside the normed features. tokens [B, N], table [vocab, C]; hidden
    [B, N, C]; the norms' weights [C] -> [B, N, 2 C], hidden's dtype."""
    if not use_triton(hidden):
        embedded = torch.nn.functional.embedding(tokens, table).to(hidden.dtype)
        return torch.cat([torch.nn.functional.rms_norm(embedded, weight.shape, token_weight, eps),
                          torch.nn.functional.rms_norm(hidden, weight.shape, weight, eps)], dim=-1)
    both = hidden.new_empty(*hidden.shape[:-1], 2, hidden.shape[-1])
    launch_norm(table, tokens.contiguous(), None, token_weight, None, both[..., 0, :], eps)
    launch_norm(hidden.contiguous(), None, None, weight, None, both[..., 1, :], eps)
    return both.flatten(-2)


def launch_norm(x, index, delta, weight, total, out, eps):
    """The sum of x [R, C], or of its rows at `index` [R], and delta to `total`, its norm to `out`, [..., C] each."""
    C, BLOCK = out.shape[-1], triton.next_power_of_2(out.shape[-1])
    _add_rms_norm_kernel[(out.numel() // C,)](x, index, delta, weight, total, out, out.stride(-2), eps,
                                              C=C, BLOCK=BLOCK, num_warps=min(max(BLOCK // 512, 1), 16))


@triton.jit
def _add_rms_norm_kernel(x_ptr, index_ptr, delta_ptr, weight_ptr, sum_ptr, out_ptr, out_row, eps,
                         C: tl.constexpr, BLOCK: tl.constexpr):
    row, c = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    taken = row if index_ptr is None else tl.load(index_ptr + row)
    x = tl.load(x_ptr + taken * C + c, mask=c < C, other=0.0).to(out_ptr.dtype.element_ty)
    if delta_ptr is not None:
        delta = tl.load(delta_ptr + row * C + c, mask=c < C, other=0.0)
        x = (x.to(tl.float32) + delta.to(tl.float32)).to(x.dtype)      # rounded: the norm is that of the stored sum
        tl.store(sum_ptr + row * C + c, x, mask=c < C)
    x = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / C + eps)
    weight = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * out_row + c, (x * scale * weight).to(out_ptr.dtype.element_ty), mask=c < C)


def rotate(x, cos, sin, norms=None):
    """Rotary, half-split form: x [B, N, H, D]; cos, sin [B, N, D/2] float32 -> x * cos + [-x2, x1] * sin, x's dtype.
    norms: (weight, weight, heads, eps), each [D]: RMSNorm every head before, the first `heads` by the first weight."""
    first, second, heads, eps = norms or (None, None, 0, 0.0)
    if not use_triton(x):
        if norms is not None:
            x = torch.cat([torch.nn.functional.rms_norm(part, weight.shape, weight, eps) for part, weight in (
                (x[:, :, :heads], first), (x[:, :, heads:], second))], dim=2)
        cos, sin = cos[:, :, None], sin[:, :, None]                                   # [B, N, 1, D/2]
        x1, x2 = x.float().chunk(2, dim=-1)
        return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1).to(x.dtype)
    (B, N, H, D), out = x.shape, x.new_empty(x.shape)
    HEADS = min(8, triton.next_power_of_2(H))
    _rotate_kernel[(B * N, triton.cdiv(H, HEADS))](
        x, cos.contiguous(), sin.contiguous(), first, second, out, *x.stride()[:3], N, H, heads, eps,
        HALF=D // 2, BLOCK=triton.next_power_of_2(D // 2), HEADS=HEADS, num_warps=2)
    return out


@triton.jit
def _rotate_kernel(x_ptr, cos_ptr, sin_ptr, first_ptr, second_ptr, out_ptr, x_b, x_n, x_h, N, H, heads, eps,
                   HALF: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    head, d = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, BLOCK)
    valid = (head < H)[:, None] & (d < HALF)[None, :]
    cos = tl.load(cos_ptr + token * HALF + d, mask=d < HALF, other=0.0)[None, :]
    sin = tl.load(sin_ptr + token * HALF + d, mask=d < HALF, other=0.0)[None, :]
    x_at = x_ptr + token // N * x_b + token % N * x_n + head[:, None] * x_h + d[None, :]
    x1 = tl.load(x_at, mask=valid, other=0.0).to(tl.float32)
    x2 = tl.load(x_at + HALF, mask=valid, other=0.0).to(tl.float32)
    if first_ptr is not None:
        weight_at = tl.where(head < heads, first_ptr, second_ptr)[:, None] + d[None, :]
        scale = tl.rsqrt((tl.sum(x1 * x1, axis=1) + tl.sum(x2 * x2, axis=1)) / (2 * HALF) + eps)[:, None]
        x1 = x1 * scale * tl.load(weight_at, mask=valid, other=0.0).to(tl.float32)
        x2 = x2 * scale * tl.load(weight_at + HALF, mask=valid, other=0.0).to(tl.float32)
        x1 = x1.to(out_ptr.dtype.element_ty).to(tl.float32)            # rounded: what is rotated is the stored norm
        x2 = x2.to(out_ptr.dtype.element_ty).to(tl.float32)
    out_at = out_ptr + (token * H + head[:, None]) * (2 * HALF) + d[None, :]
    tl.store(out_at, (x1 * cos - x2 * sin).to(out_ptr.dtype.element_ty), mask=valid)
    tl.store(out_at + HALF, (x2 * cos + x1 * sin).to(out_ptr.dtype.element_ty), mask=valid)


def silu_mul(gate_up):
    """SwiGLU's element-wise part: gate_up [..., 2F] -> silu(gate) * up [..., F]."""
    if not use_triton(gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up
    F = gate_up.shape[-1] // 2
    rows, out = gate_up.reshape(-1, 2 * F), gate_up.new_empty(*gate_up.shape[:-1], F)
    BLOCK = min(1024, triton.next_power_of_2(F))
    _silu_mul_kernel[(len(rows), triton.cdiv(F, BLOCK))](rows, out, rows.stride(0), F, BLOCK=BLOCK)
    return out


@triton.jit
def _silu_mul_kernel(gate_up_ptr, out_ptr, row_stride, F, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up_ptr + row * row_stride + f, mask=f < F, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * row_stride + F + f, mask=f < F, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * F + f, (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty), mask=f < F)
