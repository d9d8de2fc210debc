"""Phase II's experience: draft trees at groups of positions of a text, and what the target makes of them.

Nothing here carries a gradient. All trees of a batch are drafted and verified side by side and share their
sequence's keys and values: a tree names its cache row and how much of it it sees.
"""
from typing import NamedTuple

import torch

from gto.model import KV, Prefix
from gto.tree import draft_tree
from kernels.acceptance import accept, score_nodes, tree_reward


class Text(NamedTuple):
    """A batch of sequences as the frozen target sees it."""
    tokens: torch.Tensor     # [B, T]
    features: torch.Tensor   # [B, T, 3 * dim]
    logits: torch.Tensor     # [B, T, V]
    kv: KV
    supervised: torch.Tensor  # [B, T] bool: tokens to learn, written by the target or by the assistant it is to follow


class Trees(NamedTuple):
    """One drafted tree for every root, R per sequence."""
    reward: torch.Tensor     # [B, R]
    accepted: torch.Tensor   # [B, R, levels] token ids of the longest accepted sequence, padded with 0
    length: torch.Tensor     # [B, R] its length, may be 0


@torch.no_grad()
def read(target, tokens, supervised=None):
    """tokens, supervised [B, T] (None: all) -> Text."""
    hidden, features, keys, values = target(tokens)
    supervised = torch.ones_like(tokens, dtype=torch.bool) if supervised is None else supervised
    kv = KV([k.contiguous() for k in keys], [v.contiguous() for v in values])         # not views of wider projections
    return Text(tokens, features, target.logits(hidden), kv, supervised)


def sample_groups(supervised, groups, size, levels, generator):
    """Root slots of K non-overlapping groups of m adjacent positions of each text, supervised [B, T] on the CPU.

    Returns roots [B, K * m] and real [B, K] bool, False for what fills up a text with room for fewer groups.
    A root slot r has its root token at r + 1. It and the next token are supervised; behind it the text still holds
    `levels` tokens.
    """
    roots = torch.zeros(len(supervised), groups, size, dtype=torch.long)
    real = torch.zeros(len(supervised), groups, dtype=torch.bool)
    usable = (supervised[:, 1:-1] & supervised[:, 2:])[:, :max(supervised.shape[1] - 1 - levels, 0)]   # [B, slots]
    for b, row in enumerate(usable):
        offset = int(torch.randint(max(min(size, len(row)), 1), (1,), generator=generator))
        blocks = row[offset:len(row) - (len(row) - offset) % size].view(-1, size).all(1).nonzero().squeeze(1)
        chosen = blocks[torch.randperm(len(blocks), generator=generator)[:groups].sort().values]
        roots[b, :len(chosen)] = offset + chosen[:, None] * size + torch.arange(size)
        real[b, :len(chosen)] = True
    return roots.flatten(1), real


@torch.no_grad()
def grow(target, head, text, roots, shape, temperature, aggregator, eta):
    """Draft a tree with `head` behind every root and let the target score it. roots [B, R] slots -> Trees."""
    (B, R), T = roots.shape, text.tokens.shape[1]
    slots = torch.arange(T, device=roots.device).expand(B, T)
    hidden, k, v = head(head.fuse(text.features), text.tokens.roll(-1, dims=1), slots)  # the last slot is never used
    sequence = torch.arange(B, device=roots.device).repeat_interleave(R)              # [B * R]
    slot = roots.flatten()
    length = slot + 1                                                                 # true slots = tokens before the root
    tree = draft_tree(head, hidden[sequence, slot], text.tokens[sequence, length], Prefix(KV([k], [v]), length, sequence),
                      shape, temperature)
    hidden, *_ = target(tree.tokens, length[:, None] + tree.depth, tree.mask, Prefix(text.kv, length, sequence),
                        keep_kv=False)
    choice, log_prob = score_nodes(target.logits(hidden), tree.tokens, tree.parents)  # [B * R, N]
    _, _, reward = tree_reward(log_prob, tree.parents, tree.mask, aggregator, eta)    # [B * R]
    path, count, _ = accept(tree.tokens, tree.parents, tree.mask, choice, shape.levels + 1)
    accepted = tree.tokens.gather(1, path)[:, 1:]
    accepted = accepted.masked_fill(torch.arange(shape.levels, device=roots.device) >= count[:, None], 0)
    return Trees(reward.view(B, R), accepted.view(B, R, -1), count.view(B, R))


def sequence_log_prob(head, text, roots, trees):
    """log M(S | prefix) of every root's longest accepted sequence, [B, R]. With gradient, unless under no_grad."""
    hidden = head.unroll(text.features, text.tokens.roll(-1, dims=1), roots, trees.accepted[..., :-1])  # [B, R, levels, dim]
    log_q = torch.log_softmax(head.logits(hidden).float(), dim=-1)                    # [B, R, levels, V']
    draft_id = torch.zeros(text.logits.shape[-1], dtype=torch.long, device=roots.device)
    draft_id[head.token_ids] = torch.arange(len(head.token_ids), device=roots.device)
    log_q = log_q.gather(-1, draft_id[trees.accepted][..., None]).squeeze(-1)         # [B, R, levels]
    inside = torch.arange(log_q.shape[-1], device=roots.device) < trees.length[..., None]
    return log_q.masked_fill(~inside, 0.0).sum(-1)
