"""Tree attention: N new tokens per tree attend to a cached prefix and, under an ancestor mask, to each other.

The H/G query heads that share a key head see the same keys, so (node, head of the group) pairs are the rows of one
matrix: N = 1 still fills a tensor core tile, and a key is loaded once for all. A program owns BLOCK_M rows of one tree
and key head, and one *split* of the prefix, as a tree of 60 nodes has fewer row blocks than a GPU has processors. It
walks over its keys BLOCK_N at a time and keeps, per row, the largest score so far, the sum of exp(score - largest) and
the weighted sum of values, scaled down whenever a larger score turns up. The last split goes on with the tree's own
keys, the only ones under the ancestor mask. A second kernel averages the splits' outputs, weighted by exp(log-sum-exp).
The number of splits depends on shapes only, where one begins on what the *device* knows: one CUDA graph serves all."""
import math

import torch

from kernels import tl, triton, use_triton


def tree_attention(q, k, v, mask, k_cache, v_cache, length, sequence=None):
    """Attention of the nodes of B trees over their cached prefix and over their own ancestors.
    q        [B, H, N, D]    queries of the N new nodes, rotary positions applied
    k, v     [B, G, M, D]    keys and values of the tree itself, G key heads (H a multiple of G). M >= N: a frontier
                             of N nodes also sees the levels drafted before it.
    mask     [B, N, M] bool  True where the node may see the tree key (itself and its ancestors)
    k_cache, v_cache [C, G, S, D]  one row per sequence
    length   [B] int64       tree b sees cache positions 0 .. length[b]-1; may be 0
    sequence [B] int64       the cache row of tree b; None: row b. Several trees may share a row.
    Returns  [B, H, N, D] in q's dtype; softmax(q k / sqrt(D)) v, accumulated in float32."""
    if use_triton(q):
        return tree_attention_triton(q, k, v, mask, k_cache, v_cache, length, sequence)
    (B, H, N, D), G = q.shape, k.shape[1]
    # A CPU reads the longest prefix. A GPU would wait for that number, and a graph cannot: all of the cache, masked.
    S = int(length.max()) if q.device.type == "cpu" else k_cache.shape[2]
    own = slice(None) if sequence is None else sequence                               # each tree's row of the cache
    keys = torch.cat([k_cache[own, :, :S], k], dim=2)                                 # [B, G, S+M, D]
    values = torch.cat([v_cache[own, :, :S], v], dim=2)
    visible = torch.arange(S, device=q.device) < length[:, None]                      # [B, S]
    visible = torch.cat([visible[:, None].expand(B, N, S), mask], dim=2)              # [B, N, S+M]
    # The H/G query heads that share a key head become extra rows of it: no copy of the keys.
    rows = q.reshape(B, G, H // G * N, D)
    bias = visible[:, None].expand(B, H // G, N, -1).reshape(B, 1, H // G * N, -1)
    return torch.nn.functional.scaled_dot_product_attention(rows, keys, values, attn_mask=bias).view(B, H, N, D)


@triton.jit
def _attend(q, k_at, v_at, exists, inside, visible, scale, top, total, acc):
    """Add a block of keys, of which some exist, to the running softmax: q [M, D], keys at k_at [D, N], values at
    v_at [N, D], inside [D]: dimensions below D. Base 2: exp2 is one instruction. "ieee" concerns float32 only: greedy
    decoding must be exact, and tf32 would round its products to 10 bits."""
    k = tl.load(k_at, mask=exists[None, :] & inside[:, None], other=0.0)
    v = tl.load(v_at, mask=exists[:, None] & inside[None, :], other=0.0)
    scores = tl.where(visible, tl.dot(q, k, input_precision="ieee") * scale, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    weights = tl.exp2(scores - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return new_top, total * shrink + tl.sum(weights, axis=1), acc


@triton.jit
def _attention_kernel(q_ptr, k_ptr, v_ptr, mask_ptr, k_cache_ptr, v_cache_ptr, length_ptr, sequence_ptr, out_ptr,
                      lse_ptr, q_b, q_h, q_n, k_b, k_g, k_m, v_b, v_g, v_m, mask_b, mask_n, mask_m, kc_c, kc_g, kc_s,
                      vc_c, vc_g, vc_s, N, M, G, splits, scale, GROUP: tl.constexpr, D: tl.constexpr,
                      BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    row_blocks = tl.cdiv(N * GROUP, BLOCK_M)
    row_block = tl.program_id(0) % row_blocks              # fastest: programs that share keys run side by side
    split = tl.program_id(1)
    # int64 from here on: a cache of 128 sequences x 8 heads x 32k x 128 numbers passes 2^31.
    b = (tl.program_id(0) // row_blocks // G).to(tl.int64)
    g = (tl.program_id(0) // row_blocks % G).to(tl.int64)
    c = b if sequence_ptr is None else tl.load(sequence_ptr + b)
    length = tl.load(length_ptr + b).to(tl.int32)

    rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    node, head = rows // GROUP, g * GROUP + rows % GROUP
    keys, dims = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    valid, inside = rows < N * GROUP, dims < D
    q = tl.load(q_ptr + b * q_b + (head * q_h + node * q_n)[:, None] + dims[None, :],
                mask=valid[:, None] & inside[None, :], other=0.0)

    # A finite start for the maximum: while a row has seen no key, exp2(-inf - top) is 0. With -inf it would be NaN.
    top = tl.full([BLOCK_M], -1e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    # This split's share of the prefix, in whole blocks. A short prefix leaves the later splits empty.
    span = tl.cdiv(tl.cdiv(length, splits), BLOCK_N) * BLOCK_N
    start, end = split * span, tl.minimum(split * span + span, length)
    k_at = k_cache_ptr + c * kc_c + g * kc_g + start.to(tl.int64) * kc_s + dims[:, None] + keys[None, :] * kc_s
    v_at = v_cache_ptr + c * vc_c + g * vc_g + start.to(tl.int64) * vc_s + dims[None, :] + keys[:, None] * vc_s
    for first in range(start, end, BLOCK_N):
        seen = first + keys < end
        top, total, acc = _attend(q, k_at, v_at, seen, inside, seen[None, :], scale, top, total, acc)
        k_at += BLOCK_N * kc_s
        v_at += BLOCK_N * vc_s

    # The tree's own keys. The mask has a row per node, not per (node, head).
    mask_row = mask_ptr + b * mask_b + node * mask_n
    for first in range(0, tl.where(split == splits - 1, M, 0), BLOCK_N):
        m = first + keys
        own_k = k_ptr + b * k_b + g * k_g + m[None, :] * k_m + dims[:, None]
        own_v = v_ptr + b * v_b + g * v_g + m[:, None] * v_m + dims[None, :]
        visible = tl.load(mask_row[:, None] + m[None, :] * mask_m, mask=valid[:, None] & (m < M)[None, :], other=0) != 0
        top, total, acc = _attend(q, own_k, own_v, m < M, inside, visible, scale, top, total, acc)

    # Rows of the output are (tree, node, head): the layout the next linear layer wants.
    out_row = split.to(tl.int64) * (tl.num_programs(0) // row_blocks * N * GROUP) + (b * N + node) * G * GROUP + head
    if lse_ptr is not None:
        tl.store(lse_ptr + out_row, top + tl.log2(total), mask=valid)   # -inf for an empty split: weight 0
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out_ptr + out_row[:, None] * D + dims[None, :], out.to(out_ptr.dtype.element_ty),
             mask=valid[:, None] & inside[None, :])


@triton.jit
def _combine_kernel(part_ptr, lse_ptr, out_ptr, splits, D: tl.constexpr, SPLITS: tl.constexpr, BLOCK_D: tl.constexpr):
    row, split, dims = tl.program_id(0).to(tl.int64), tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    at = split * tl.num_programs(0) + row                                               # [SPLITS]
    lse = tl.load(lse_ptr + at, mask=split < splits, other=float("-inf"))
    weight = tl.exp2(lse - tl.maximum(tl.max(lse, axis=0), -1e30))
    total = tl.sum(weight, axis=0)
    part = tl.load(part_ptr + at[:, None] * D + dims[None, :],                          # empty splits are not read
                   mask=(weight > 0)[:, None] & (dims < D)[None, :], other=0.0)
    out = tl.sum(part * weight[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + row * D + dims, out.to(out_ptr.dtype.element_ty), mask=dims < D)


def split_count(programs, capacity, device):
    """As few as fill the GPU, of two blocks of keys at least: every split's output, in float32, costs traffic, too."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
    return max(1, min(processors // programs, capacity // 128, 64))


def tree_attention_triton(q, k, v, mask, k_cache, v_cache, length, sequence=None):
    (B, H, N, D), (G, M), S = q.shape, k.shape[1:3], k_cache.shape[2]
    rows, BLOCK_D = N * H // G, max(16, triton.next_power_of_2(D))                    # rows per key head
    BLOCK_N = 64 * 128 // max(BLOCK_D, 128)                                           # wide heads spill registers
    BLOCK_M, warps, stages = min(max(16, triton.next_power_of_2(rows)), BLOCK_N), 8 if rows > 32 else 4, 3
    if q.dtype == torch.float32:  # exact products have no tensor cores: small blocks, or registers spill
        BLOCK_M, BLOCK_N, warps, stages = 16, 16, 4, 2
    programs = B * G * triton.cdiv(rows, BLOCK_M)
    splits = split_count(programs, S, q.device)
    out = q.new_empty(B, N, H, D)
    part = q.new_empty(splits, B, N, H, D, dtype=torch.float32) if splits > 1 else out
    lse = q.new_empty(splits, B, N, H, dtype=torch.float32) if splits > 1 else None
    _attention_kernel[(programs, splits)](
        q, k, v, mask, k_cache, v_cache, length, sequence, part, lse, *q.stride()[:3], *k.stride()[:3],
        *v.stride()[:3], *mask.stride(), *k_cache.stride()[:3], *v_cache.stride()[:3], N, M, G, splits,
        math.log2(math.e) / math.sqrt(D), GROUP=H // G, D=D, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D,
        num_warps=warps, num_stages=stages)
    if splits > 1:
        _combine_kernel[(B * N * H,)](part, lse, out, splits, D, triton.next_power_of_2(splits), BLOCK_D)
    return out.transpose(1, 2)
