"""The draft tree: EAGLE-2's dynamic drafting (the decoding policy G of the paper), batched over many prefixes."""
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from gto.errors import UserError


@dataclass
class TreeShape:
    """k children per node and k nodes per frontier, d levels, g drafted nodes kept. A chain of n is (1, n, n).

    EAGLE's files say (depth, top_k, total_token) = (levels - 1, branch, nodes + 1): they count neither the first
    level nor leave out the root.
    """
    branch: int = 8
    levels: int = 5
    nodes: int = 24

    def __post_init__(self):
        most = self.branch + (self.levels - 1) * self.branch ** 2
        if min(self.branch, self.levels, self.nodes) < 1 or self.nodes > most:
            raise UserError(f"tree {self}: {self.nodes} nodes asked for, {self.branch} children and {self.levels} levels"
                            f" give 1 to {max(most, 0)}; choose fewer nodes, more levels or more children")

    def __str__(self):
        return f"{self.branch},{self.levels},{self.nodes}"

    @classmethod
    def parse(cls, text):
        """'8,5,24' -> TreeShape(8, 5, 24)."""
        try:
            branch, levels, nodes = (int(part) for part in text.split(","))
        except ValueError:
            raise UserError(f"tree '{text}' is not three numbers: write children,levels,nodes, for example 8,5,24")
        return cls(branch, levels, nodes)


class Tree(NamedTuple):
    """N = nodes + 1 nodes per tree; node 0 is the root, the last committed token. Parents stand before children."""
    tokens: torch.Tensor    # [B, N]
    parents: torch.Tensor   # [B, N]; the root is its own parent
    mask: torch.Tensor      # [B, N, N] bool: ancestors and self
    depth: torch.Tensor     # [B, N]; the root's is 0
    scores: torch.Tensor    # [B, N] sum of the draft log-probabilities on the path from the root


def score_temperature(temperature):
    """The temperature of the draft's log-probabilities in the tree's scores, by the temperature of decoding.

    At T=0 only the target's arg-max is accepted, which a draft trained to match the target's distribution
    underrates where it is likely: sharper scores estimate it better. At T=1 the draft is calibrated as it is.
    """
    return min(1.0, max(0.4, temperature))


def ancestor_mask(parents, levels):
    """parents [B, N], the root its own -> [B, N, N] bool: `[b, i, j]` says that j is i or an ancestor of i.

    Repeated squaring of "one step up or stay": log2(levels) products instead of a walk.
    """
    eye = torch.eye(parents.shape[1], device=parents.device)
    reach = ((torch.nn.functional.one_hot(parents, parents.shape[1]) + eye) > 0).float()  # [B, N, N]
    for _ in range(math.ceil(math.log2(max(levels, 2)))):
        reach = (reach @ reach).clamp(max=1)
    return reach > 0


def rows(x, index):
    """x [B, N, ...], index [B, K] -> x[b, index[b, k]], [B, K, ...]."""
    return x.gather(1, index.view(*index.shape, *[1] * (x.dim() - 2)).expand(*index.shape, *x.shape[2:]))


def propose(head, hidden, k, temperature):
    """The k likeliest next tokens: hidden [..., dim] -> log-probabilities and target token ids, [..., k] each."""
    log_p = torch.log_softmax(head.logits(hidden).float() / temperature, dim=-1)      # [..., V']
    top, index = log_p.topk(k, dim=-1)
    return top, head.token_ids[index]


def draft_tree(head, hidden, root, prefix, shape, temperature):
    """Draft one tree per prefix.

    head      a DraftHead; prefix: its cache and the number of true slots in it, `length` [B]
    hidden    [B, dim]  the head's output at the last true slot, which predicts the first level
    root      [B]       the last committed token
    temperature         of the scores, see `score_temperature`
    Returns a Tree. No host synchronisation; levels - 1 head passes over a frontier of k nodes.
    """
    k, B = shape.branch, len(root)
    score, token = propose(head, hidden, k, temperature)                              # [B, k] each
    scores, tokens, parents = [score], [token], [torch.zeros_like(token)]             # parent: candidate index + 1
    feature, past = hidden[:, None].expand(B, k, -1), None                            # [B, k, dim]
    self_only = torch.eye(k, dtype=torch.bool, device=root.device).expand(B, k, k)
    seen, frontier, made = self_only, torch.arange(k, device=root.device).expand(B, k), k
    for level in range(1, shape.levels):
        # Expand: the frontier's children are all candidates, ...
        positions = (prefix.length + level - 1)[:, None].expand(B, k)
        out, *past = head(feature, token, positions, seen, prefix, past)              # [B, k, dim]
        child, child_token = propose(head, out, k, temperature)                       # [B, k, k]
        scores.append((score[..., None] + child).flatten(1))
        tokens.append(child_token.flatten(1))
        parents.append((frontier + 1)[..., None].expand(B, k, k).flatten(1))
        if level == shape.levels - 1:
            break
        # ... and the k best of them are the next frontier.
        score, best = scores[-1].topk(k, dim=1)                                       # [B, k]
        token, feature, origin = rows(tokens[-1], best), rows(out, best // k), best // k
        seen = torch.cat([rows(seen, origin), self_only], dim=2)                      # [B, k, (level+1) * k]
        frontier, made = made + best, made + k * k
    return rerank(root, torch.cat(tokens, 1), torch.cat(parents, 1), torch.cat(scores, 1), shape)


def rerank(root, tokens, parents, scores, shape):
    """Keep the g best of C candidates; tokens, parents (candidate index + 1, 0: the root), scores [B, C].

    A child never outscores its parent and the sort is stable, so at a tie the parent, made earlier, comes first:
    no kept node is an orphan. Kept nodes stand in order of creation, hence parents before children.
    """
    kept = scores.sort(dim=1, descending=True, stable=True).indices[:, :shape.nodes].sort(dim=1).values  # [B, g]
    place = torch.zeros_like(tokens).scatter(1, kept, torch.arange(1, shape.nodes + 1, device=kept.device).expand_as(kept))
    place = torch.nn.functional.pad(place, (1, 0))                                    # candidate index + 1 -> node
    parents = torch.nn.functional.pad(place.gather(1, parents.gather(1, kept)), (1, 0))  # [B, N]
    mask = ancestor_mask(parents, shape.levels)
    tokens = torch.cat([root[:, None], tokens.gather(1, kept)], dim=1)
    scores = torch.nn.functional.pad(scores.gather(1, kept), (1, 0))
    return Tree(tokens, parents, mask, mask.sum(-1) - 1, scores)
