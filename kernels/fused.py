"""The small steps of decoding, each one kernel instead of three to a dozen: the element-wise ones of a decoder layer,
in float32, and the bookkeeping of a draft. Launching one takes about as long as its work does: fewer are faster."""
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
    C = out.shape[-1]
    _add_rms_norm_kernel[(out.numel() // C,)](x, index, delta, weight, total, out, out.stride(-2), eps, C,
                                              num_warps=min(max(triton.next_power_of_2(C) // 512, 1), 16))


@triton.jit
def _add_rms_norm_kernel(x_ptr, index_ptr, delta_ptr, weight_ptr, sum_ptr, out_ptr, out_row, eps, C: tl.constexpr):
    row, c = tl.program_id(0).to(tl.int64), tl.arange(0, triton.next_power_of_2(C))
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
    _rotate_kernel[(B * N, triton.cdiv(H, 8))](
        x, cos.contiguous(), sin.contiguous(), first, second, out, *x.stride()[:3], N, H, heads, eps,
        HALF=D // 2, HEADS=8, num_warps=2)
    return out


@triton.jit
def _rotate_kernel(x_ptr, cos_ptr, sin_ptr, first_ptr, second_ptr, out_ptr, x_b, x_n, x_h, N, H, heads, eps,
                   HALF: tl.constexpr, HEADS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    head, d = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, triton.next_power_of_2(HALF))
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


def frontier(scores, tokens, hidden, seen, older):
    """The k best candidates of a draft's newest level, which was proposed by m nodes, k children each; at a tie the
    lowest index first.
    scores, tokens [B, m * k]   of the candidates, siblings side by side; older: how many stand before this level
    hidden [B, m, dim]          what their proposers put out
    seen [B, m, M] bool         which nodes of earlier frontiers their proposers saw
    Returns  score, token [B, k]; feature [B, k, dim] of each one's proposer; seen [B, k, M + k]: what its proposer
             saw, and itself; parents [B, k, k]: the number among all candidates, + 1, for each one's k children"""
    (B, m, dim), M, k = hidden.shape, seen.shape[2], scores.shape[1] // hidden.shape[1]
    if not use_triton(scores):
        score, best = (x[:, :k] for x in scores.sort(dim=1, descending=True, stable=True))
        origin = (best // k)[..., None]                                               # [B, k, 1] who proposed them
        itself = torch.eye(k, dtype=torch.bool, device=best.device).expand(B, k, k)
        sees = torch.cat([seen.gather(1, origin.expand(B, k, M)), itself], dim=2)
        feature = hidden.gather(1, origin.expand(B, k, dim))
        return score, tokens.gather(1, best), feature, sees, (older + best + 1)[..., None].expand(B, k, k)
    score, token = scores.new_empty(B, k), tokens.new_empty(B, k)
    feature, sees, parents = hidden.new_empty(B, k, dim), seen.new_empty(B, k, M + k), tokens.new_empty(B, k, k)
    _frontier_kernel[(B * k,)](
        scores, tokens, hidden.contiguous(), seen.contiguous(), score, token, feature, sees, parents, older, M, dim,
        m=m, K=k, COLUMNS=triton.next_power_of_2(M + k))
    return score, token, feature, sees, parents


@triton.jit
def _frontier_kernel(scores_ptr, tokens_ptr, hidden_ptr, seen_ptr, score_ptr, token_ptr, feature_ptr, sees_ptr,
                     parents_ptr, older, M, dim, m: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr):
    """One node of the frontier: it finds the candidate that is `rank`-th best and copies what belongs to it."""
    node, candidate = tl.program_id(0).to(tl.int64), tl.arange(0, triton.next_power_of_2(m * K))
    b, rank = node // K, tl.program_id(0) % K
    x = tl.load(scores_ptr + b * m * K + candidate, mask=candidate < m * K, other=float("-inf"))
    x = tl.where(candidate < m * K, tl.maximum(x, -3e38), float("-inf"))              # only what is taken is -inf
    for _ in range(rank):
        x = tl.where(candidate == tl.argmax(x, axis=0), float("-inf"), x)
    best = b * m * K + tl.argmax(x, axis=0)                                           # of all B * m * K
    tl.store(score_ptr + node, tl.load(scores_ptr + best))
    tl.store(token_ptr + node, tl.load(tokens_ptr + best))
    child, column = tl.arange(0, triton.next_power_of_2(K)), tl.arange(0, COLUMNS)
    tl.store(parents_ptr + node * K + child, older + best % (m * K) + 1, mask=child < K)
    proposer = best // K
    seen = tl.load(seen_ptr + proposer * M + column, mask=column < M, other=0) != 0
    tl.store(sees_ptr + node * (M + K) + column, seen | (column == M + rank), mask=column < M + K)
    for first in range(0, dim, 1024):
        d = first + tl.arange(0, 1024)
        tl.store(feature_ptr + node * dim + d, tl.load(hidden_ptr + proposer * dim + d, mask=d < dim), mask=d < dim)
