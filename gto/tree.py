"""The draft tree: EAGLE-2's dynamic drafting (the decoding policy G of the paper), batched over many prefixes."""
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn import functional as F

from gto.util import UserError
from kernels.acceptance import propose
from kernels.fused import frontier


@dataclass
class TreeShape:
    """top_k children per node and nodes per frontier, depth levels, `nodes` drafted nodes kept. A chain is (1, n, n).
    EAGLE's (depth, top_k, total_token) is our (depth - 1, top_k, nodes + 1): it counts the root, not level one."""
    top_k: int = 8
    depth: int = 5
    nodes: int = 24

    @property
    def num_candidates(self):
        """Nodes that are proposed, before the re-ranking."""
        return self.top_k + (self.depth - 1) * self.top_k ** 2

    def __post_init__(self):
        if min(self.top_k, self.depth, self.nodes) < 1 or not self.nodes <= self.num_candidates <= 4096:
            raise UserError(f"--tree {self}: must be 1 or more, nodes <= children + (depth - 1) * children**2 <= 4096")

    def __str__(self):
        return f"{self.top_k},{self.depth},{self.nodes}"

    @classmethod
    def parse(cls, text):
        """'8,5,24' -> TreeShape(8, 5, 24)."""
        try:
            top_k, depth, nodes = (int(part) for part in text.split(","))
        except ValueError:
            raise UserError(f"--tree {text!r:.99} is not three numbers: write children,depth,nodes, for example 8,5,24")
        return cls(top_k, depth, nodes)


class Tree(NamedTuple):
    """N = nodes + 1 nodes per tree; node 0 is the root, the last committed token. Parents stand before children."""
    tokens: torch.Tensor    # [B, N]
    parents: torch.Tensor   # [B, N]; the root is its own parent
    mask: torch.Tensor      # [B, N, N] bool: ancestors and self
    depth: torch.Tensor     # [B, N]; the root's is 0
    scores: torch.Tensor    # [B, N] sum of the draft log-probabilities on the path from the root


def score_temperature(temperature):
    """The temperature of the draft's log-probabilities in the tree's scores, by that of decoding. At T=0 only the
    target's arg-max is accepted, which a draft trained to match its distribution underrates where it is likely: sharper
    scores estimate it better. At T=1 the draft is calibrated as it is."""
    return min(1.0, max(0.4, temperature))


def ancestor_mask(parents, depth):
    """parents [B, N], the root its own -> [B, N, N] bool: `[b, i, j]` says that j is i or an ancestor of i. Repeated
    squaring of "one step up or stay": log2(depth) products instead of a walk."""
    index = torch.arange(parents.shape[1], device=parents.device)
    reach = ((index == parents[..., None]) | (index == index[:, None])).float()       # [B, N, N]
    for _ in range(math.ceil(math.log2(max(depth, 2)))):
        reach = (reach @ reach).clamp(max=1)
    return reach > 0


def rows(x, index):
    """x [B, N, ...], index [B, K] -> x[b, index[b, k]], [B, K, ...]."""
    return x.gather(1, index.view(*index.shape, *[1] * (x.dim() - 2)).expand(*index.shape, *x.shape[2:]))


class Draft(NamedTuple):
    """A draft of some levels, before re-ranking: k candidates at the first level, k * k at every further one, numbered
    level by level, in groups of k siblings; `parents` holds number + 1, 0: the root. With k = 2:
        level 1    0 1                    parents 0 0        frontier, best first: 1 0
        level 2    2 3 of 1, 4 5 of 0     parents 2 2 1 1    frontier, say: 3 5
        level 3    6 7 of 3, 8 9 of 5     parents 4 4 6 6
    Two candidates are `older` than level 2, where node 5 = older + best is `best` = 3 (see `frontier`): frontier node
    `best // k` = 1 proposed it. It saw what its proposer saw, and itself: k more columns of `seen`."""
    scores: tuple           # by level [B, n]: sums of draft log-probabilities from the root
    tokens: tuple           # by level [B, n]
    parents: tuple          # by level [B, n]: index among all candidates + 1, 0 is the root
    hidden: torch.Tensor    # [B, m, dim] the head's outputs that proposed the newest level, k children each
    seen: torch.Tensor      # [B, m, M] bool: which of the M drafted nodes that went through the head each of them saw
    past: tuple | None      # keys, values [B, kv_heads, M, D] of those M nodes


def first_level(head, hidden, k, temperature):
    """hidden [B, dim], the head's output at the last true slot -> a Draft of one level. No head pass."""
    score, token = propose(head.logits(hidden), head.token_ids, k, temperature)       # [B, k] each
    nothing = torch.zeros(len(hidden), 1, 0, dtype=torch.bool, device=hidden.device)
    return Draft((score,), (token,), (torch.zeros_like(token),), hidden[:, None], nothing, None)


def expand(head, draft, prefix, temperature):
    """One head pass: the frontier, the k best candidates of the newest level, gets k children each. -> Draft."""
    level, (B, k) = len(draft.scores), draft.scores[0].shape
    older = sum(scores.shape[1] for scores in draft.scores[:-1])
    score, token, feature, seen, parents = frontier(draft.scores[-1], draft.tokens[-1], draft.hidden, draft.seen, older)
    positions = (prefix.length + (level - 1))[:, None].expand(B, k)
    hidden, *past = head(feature, token, positions, seen, prefix, draft.past)         # [B, k, dim]
    child, child_token = propose(head.logits(hidden), head.token_ids, k, temperature)  # [B, k, k]
    return Draft((*draft.scores, (score[..., None] + child).flatten(1)), (*draft.tokens, child_token.flatten(1)),
                 (*draft.parents, parents.flatten(1)), hidden, seen, tuple(past))


def draft_tree(head, hidden, root, prefix, shape, temperature):
    """Draft one tree per prefix, by depth - 1 head passes over a frontier of k nodes. -> Tree. No host synchronisation.
    hidden [B, dim]: the head's output at the last true slot, which predicts the first level; root [B]: the last
    committed token; prefix: the head's cache, of `length` [B] true slots; temperature: see `score_temperature`."""
    return rerank(root, *draft_candidates(head, hidden, prefix, shape, temperature), shape)


def draft_candidates(head, hidden, prefix, shape, temperature):
    """As `draft_tree`, before the re-ranking. -> see `candidates`."""
    draft = first_level(head, hidden, shape.top_k, temperature)
    for _ in range(shape.depth - 1):
        draft = expand(head, draft, prefix, temperature)
    return candidates(draft)


def candidates(draft):
    """All levels side by side: tokens, parents, scores [B, C] each."""
    return tuple(torch.cat(x, dim=1) for x in (draft.tokens, draft.parents, draft.scores))


def rerank(root, tokens, parents, scores, shape):
    """Keep the g best of C candidates. -> Tree. A child never outscores its parent and the sort is stable, so at a tie
    the parent, made earlier, comes first: no kept node is an orphan. Kept nodes stand in order of creation."""
    kept = scores.sort(dim=1, descending=True, stable=True).indices[:, :shape.nodes].sort(dim=1).values  # [B, g]
    numbers = torch.arange(1, shape.nodes + 1, device=kept.device).expand_as(kept)
    node = F.pad(torch.zeros_like(tokens).scatter(1, kept, numbers), (1, 0))          # candidate index + 1 -> node
    parents = F.pad(node.gather(1, parents.gather(1, kept)), (1, 0))                  # [B, N]
    mask = ancestor_mask(parents, shape.depth)
    tokens = torch.cat([root[:, None], tokens.gather(1, kept)], dim=1)
    return Tree(tokens, parents, mask, mask.sum(-1) - 1, F.pad(scores.gather(1, kept), (1, 0)))
