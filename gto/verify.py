"""Verification: which drafted nodes the target accepts, and the token it adds itself. Lossless.

The rule: at the current node draw ONE token from the target's own distribution there (arg-max at T=0). If a child
carries that token, move to the child and go on; otherwise emit the token and stop.

Why the output is exactly the target's: every emitted token was drawn by the target, from its distribution given all
the tokens emitted before it. The tree decides only whether the next draw can be read off the same forward pass. This
needs two things: the tree must not depend on the draws (it is drafted without a look at them), and a node's logits must
be those of its own path (the ancestor mask sees to that).

Rejection sampling with q = 1, as in EAGLE's code (try the children in turn, accept x with probability p(x), else set
p(x) = 0 and renormalise), also takes child i with probability p_i, and leaves p without the children: with s = p_1 +
.. + p_{i-1} it reaches i with probability 1 - s, and takes it there with p_i / (1 - s). But it needs many draws.

All nodes draw at once, reached or not: "walk down from the root" becomes "a node is accepted if it and all its
ancestors match", `accept`. Nodes of one depth may share a random number, as only one of them is ever reached: the
engine has one for every position of a text. So the same seed writes the same text, by any tree, at any temperature."""
from dataclasses import dataclass

import torch

from gto.util import UserError
from kernels.acceptance import score_nodes


@dataclass
class Sampling:
    temperature: float = 0.0   # 0: greedy
    top_k: int = 0             # 0: off
    top_p: float = 1.0         # 1: off

    def __post_init__(self):
        if not self.temperature >= 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise UserError(f"--temperature and --top-k must be 0 or more, --top-p above 0 and at most 1, not {self}")


def warp(logits, sampling):
    """logits [..., V] -> logits [..., V] of the distribution sampled from: temperature, then top-k, then top-p, which
    keeps the smallest set of likeliest tokens whose probability reaches it."""
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


def choose(logits, sampling, uniform):
    """The target's next token after every node: logits [B, N, V], uniform [B, N] random numbers, if T > 0 -> [B, N]."""
    temperature = sampling.temperature
    if temperature > 0 and (sampling.top_k or sampling.top_p < 1):
        logits, temperature = warp(logits, sampling), 1.0
    return score_nodes(logits, temperature=temperature, uniform=uniform)[0]


def accept(tree, choice, width):
    """The longest path of nodes that agree with the target's choices [B, N] after each. width P: depth + 1 or more.
    Returns path [B, P] node indices from the root down, padded with 0; num_accepted [B] nodes without the root;
    bonus [B], the target's choice at the last of them. Siblings carry different tokens: one node per depth at most."""
    match = tree.tokens == choice.gather(1, tree.parents)                             # [B, N]
    match[:, 0] = True
    accepted = (match[:, None] | ~tree.mask).all(-1)                                  # [B, N]
    slot = torch.where(accepted, tree.depth, width)                                   # rejected: to a spare slot
    index = torch.arange(match.shape[1], device=match.device).expand_as(match)
    path = index.new_zeros(len(match), width + 1).scatter(1, slot, index)[:, :width]  # [B, P]
    num_accepted = accepted.sum(-1) - 1
    return path, num_accepted, choice.gather(1, path.gather(1, num_accepted[:, None])).squeeze(1)


def verify(logits, tree, sampling, width, uniform=None):
    """logits [B, N, V] after each node of the tree; uniform [B, N], see `choose` -> path, num_accepted, see `accept`;
    emitted [B, width]: the accepted tokens, then the token the target adds itself, then padding."""
    path, num_accepted, bonus = accept(tree, choose(logits, sampling, uniform), width)
    drafted = tree.tokens.gather(1, path).roll(-1, dims=1)             # path tokens without the root
    return path, num_accepted, drafted.scatter(1, num_accepted[:, None], bonus[:, None])
