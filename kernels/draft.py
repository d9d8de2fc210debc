"""The bookkeeping of drafting a tree: small tensors, where PyTorch would launch an operation for every line."""
import torch

from kernels import tl, triton, use_triton


def frontier(scores, tokens, hidden, seen, older):
    """The k best candidates of a draft's newest level, which was proposed by m nodes, k children each; at a tie the
    lowest index first.

    scores, tokens [B, m * k]   of the candidates, siblings side by side
    hidden [B, m, dim]          what their proposers put out
    seen [B, m, M] bool         which nodes of earlier frontiers their proposers saw
    older                       candidates before this level
    Returns  score, token [B, k]; feature [B, k, dim] of each one's proposer; seen [B, k, M + k]: what its proposer
             saw, and itself; parents [B, k, k]: the number among all candidates, + 1, for each one's k children"""
    (B, m, dim), M = hidden.shape, seen.shape[2]
    k = scores.shape[1] // m
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
        scores, tokens, hidden.contiguous(), seen.contiguous(), score, token, feature, sees, parents, older, m, M, dim,
        K=k, BLOCK=triton.next_power_of_2(m * k), BLOCK_K=triton.next_power_of_2(k),
        BLOCK_M=triton.next_power_of_2(M + k), BLOCK_D=min(1024, triton.next_power_of_2(dim)))
    return score, token, feature, sees, parents


@triton.jit
def _frontier_kernel(scores_ptr, tokens_ptr, hidden_ptr, seen_ptr, score_ptr, token_ptr, feature_ptr, sees_ptr,
                     parents_ptr, older, m, M, dim, K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
                     BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """One node of the frontier: it finds the candidate that is `rank`-th best and copies what belongs to it."""
    node, candidate = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    b, rank = node // K, tl.program_id(0) % K
    scores_ptr, tokens_ptr = scores_ptr + b * m * K, tokens_ptr + b * m * K
    x = tl.load(scores_ptr + candidate, mask=candidate < m * K, other=float("-inf"))
    x = tl.where(candidate < m * K, tl.maximum(x, -3e38), float("-inf"))              # only what is taken is -inf
    for _ in range(rank):
        x = tl.where(candidate == tl.argmax(x, axis=0), float("-inf"), x)
    best = tl.argmax(x, axis=0)
    proposer = b * m + best // K
    tl.store(score_ptr + node, tl.load(scores_ptr + best))
    tl.store(token_ptr + node, tl.load(tokens_ptr + best))
    child, column = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_M)
    tl.store(parents_ptr + node * K + child, older + best + 1, mask=child < K)
    seen = tl.load(seen_ptr + proposer * M + column, mask=column < M, other=0) != 0
    tl.store(sees_ptr + node * (M + K) + column, seen | (column == M + rank), mask=column < M + K)
    for first in range(0, dim, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        tl.store(feature_ptr + node * dim + d, tl.load(hidden_ptr + proposer * dim + d, mask=d < dim), mask=d < dim)
