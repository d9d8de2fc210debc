"""Verification: which drafted nodes the target accepts, and the token it adds itself. Lossless.

The rule: at the current node draw ONE token from the target's own distribution there (arg-max at T=0). If a child
carries that token, move to the child and go on; otherwise emit the token and stop.

Why the output is exactly the target's: every emitted token was drawn by the target, from its distribution given all
the tokens emitted before it. The tree decides only whether the draw at the next position can be read off the same
forward pass. This needs two things: the tree must not depend on the draws (it is drafted before them), and a node's
logits must be those of its own path (the ancestor mask sees to that).

How this compares with rejection sampling with q = 1, as in EAGLE's code (try the children in turn, accept x with
probability p(x), else set p(x) = 0 and renormalise): child i is reached and taken with probability
(1 - p_1 - .. - p_{i-1}) * p_i / (1 - p_1 - .. - p_{i-1}) = p_i, and what is left is p without the children. The
same distribution over (child taken, token emitted), with one draw instead of one per child.

The draws of all nodes are independent, so they can be made for all nodes at once, whether or not a node is reached:
"walk down from the root" then becomes "a node is accepted if it and all its ancestors match" (kernels/acceptance.py).
"""
from dataclasses import dataclass

import torch

from gto.errors import UserError
from kernels.acceptance import accept, score_nodes


@dataclass
class Sampling:
    temperature: float = 0.0   # 0: greedy
    top_k: int = 0             # 0: off
    top_p: float = 1.0         # 1: off

    def __post_init__(self):
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise UserError(f"{self}: needs temperature >= 0, top_k >= 0 (0 is off) and 0 < top_p <= 1 (1 is off)")


def warp(logits, sampling):
    """logits [..., V] -> logits [..., V] of the distribution sampled from: temperature, then top-k, then top-p.

    top_p keeps the smallest set of likeliest tokens whose probability reaches it.
    """
    logits = logits.float() / sampling.temperature
    if sampling.top_k:
        least = logits.topk(min(sampling.top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if sampling.top_p < 1:
        ordered, index = logits.sort(dim=-1, descending=True)
        p = ordered.softmax(-1)
        cut = p.cumsum(-1) - p >= sampling.top_p                       # what stands before already reaches top_p
        logits = logits.masked_fill(cut.scatter(-1, index, cut), float("-inf"))
    return logits


def choose(logits, sampling):
    """The target's next token after every node: logits [B, N, V] -> [B, N]."""
    if sampling.temperature == 0:
        return score_nodes(logits, temperature=0.0)[0]
    uniform = torch.rand(logits.shape[:2], device=logits.device)
    if sampling.top_k or sampling.top_p < 1:
        return score_nodes(warp(logits, sampling), temperature=1.0, uniform=uniform)[0]
    return score_nodes(logits, temperature=sampling.temperature, uniform=uniform)[0]


def verify(logits, tree, sampling, width):
    """logits [B, N, V] after each node of the tree; width: tree levels + 1.

    Returns path [B, width] node indices from the root, padded with 0; count [B] accepted drafts;
            emitted [B, width]: the accepted tokens, then the token the target adds itself, then padding.
    """
    choice = choose(logits, sampling)
    path, count, bonus = accept(tree.tokens, tree.parents, tree.mask, choice, width)
    drafted = tree.tokens.gather(1, path).roll(-1, dims=1)             # path tokens without the root
    emitted = drafted.scatter(1, count[:, None], bonus[:, None])
    return path, count, emitted
