"""Tree attention: N new tokens per tree attend to a cached prefix and, under an ancestor mask, to each other."""
import torch

from kernels import use_triton


def tree_attention(q, k, v, mask, k_cache, v_cache, length, sequence=None):
    """Attention of the nodes of B trees over their cached prefix and over their own ancestors.

    q        [B, H, N, D]    queries of the N new nodes, rotary positions applied
    k, v     [B, G, M, D]    keys and values of the tree itself, G key heads (H a multiple of G). M >= N: a frontier
                             of N nodes also sees the levels drafted before it.
    mask     [B, N, M] bool  True where the node may see the tree key (itself and its ancestors)
    k_cache, v_cache [C, G, S, D]  one row per sequence
    length   [B] int64       tree b sees cache positions 0 .. length[b]-1; may be 0
    sequence [B] int64       the cache row of tree b; None: row b. Several trees may share a row.
    Returns  [B, H, N, D] in q's dtype; softmax(q k / sqrt(D)) v, accumulated in float32.
    """
    run = tree_attention_triton if use_triton(q) else tree_attention_reference
    return run(q, k, v, mask, k_cache, v_cache, length, sequence)


def tree_attention_reference(q, k, v, mask, k_cache, v_cache, length, sequence=None):
    """One softmax over [prefix, tree], as a student would write it."""
    (B, H, N, D), G = q.shape, k.shape[1]
    S = int(length.max())                                                            # a sync: fine on CPU
    k_prefix, v_prefix = k_cache[:, :, :S], v_cache[:, :, :S]                         # [C, G, S, D]
    if sequence is not None:
        k_prefix, v_prefix = k_prefix[sequence], v_prefix[sequence]                   # [B, G, S, D]
    keys = torch.cat([k_prefix, k], dim=2)                                            # [B, G, S+M, D]
    values = torch.cat([v_prefix, v], dim=2)
    visible = torch.arange(S, device=q.device) < length[:, None]                      # [B, S]
    visible = torch.cat([visible[:, None].expand(B, N, S), mask], dim=2)              # [B, N, S+M]
    # The H/G query heads that share a key head become extra rows of it: no copy of the keys.
    rows = q.reshape(B, G, H // G * N, D)
    bias = visible[:, None].expand(B, H // G, N, -1).reshape(B, 1, H // G * N, -1)
    out = torch.nn.functional.scaled_dot_product_attention(rows, keys, values, attn_mask=bias)
    return out.view(B, H, N, D)


def tree_attention_triton(q, k, v, mask, k_cache, v_cache, length, sequence=None):
    raise NotImplementedError
