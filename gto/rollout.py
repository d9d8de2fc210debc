"""Phase II's experience: draft trees at groups of positions of a text, and what the target makes of them.

Nothing here but `sequence_log_prob` carries a gradient. All trees of a batch are drafted and verified side by side and
share their sequence's keys and values: a tree names its cache row and how much of it it sees."""
from typing import NamedTuple

import torch

from gto.model import KV, Prefix
from gto.tree import draft_tree, rows
from gto.verify import accept
from kernels.acceptance import score_nodes


class Text(NamedTuple):
    """A batch of sequences as the frozen target sees it."""
    tokens: torch.Tensor      # [B, T]
    features: torch.Tensor    # [B, T, 3 * dim]
    hidden: torch.Tensor      # [B, T, dim] behind the last norm, for `target.logits`
    choice: torch.Tensor      # [B, T] the likeliest next token
    kv: KV
    supervised: torch.Tensor  # [B, T] bool: tokens to learn, written by the target or by the assistant it is to follow


class Trees(NamedTuple):
    """One drafted tree for every root, R per sequence."""
    reward: torch.Tensor      # [B, R]
    accepted: torch.Tensor    # [B, R, depth] token ids of the longest accepted sequence, padded with 0
    length: torch.Tensor      # [B, R] its length, may be 0


@torch.no_grad()
def target_forward(target, tokens, supervised=None):
    """tokens, supervised [B, T] (None: all) -> Text."""
    hidden, features, keys, values = target(tokens)
    supervised = torch.ones_like(tokens, dtype=torch.bool) if supervised is None else supervised
    kv = KV([k.contiguous() for k in keys], [v.contiguous() for v in values])         # not views of wider projections
    choice = torch.stack([target.logits(row).argmax(-1) for row in hidden])           # not the logits of all at once
    return Text(tokens, features, hidden, choice, kv, supervised)


def sample_groups(supervised, groups, size, depth, generator):
    """Root slots of K non-overlapping groups of m adjacent positions of each text, supervised [B, T] on the CPU.

    A root slot r has its root token at r + 1: it and the next are supervised, and `depth` more tokens follow. Returns
    roots [B, K * m] and valid [B, K] bool, False for what fills up a text with room for fewer groups."""
    roots = torch.zeros(len(supervised), groups, size, dtype=torch.long)
    valid = torch.zeros(len(supervised), groups, dtype=torch.bool)
    usable = (supervised[:, 1:-1] & supervised[:, 2:])[:, :max(supervised.shape[1] - 1 - depth, 0)]   # [B, slots]
    for b, row in enumerate(usable):
        offset = int(torch.randint(max(min(size, len(row)), 1), (1,), generator=generator))
        blocks = row[offset:len(row) - (len(row) - offset) % size].view(-1, size).all(1).nonzero().squeeze(1)
        chosen = blocks[torch.randperm(len(blocks), generator=generator)[:groups].sort().values]
        roots[b, :len(chosen)] = offset + chosen[:, None] * size + torch.arange(size)
        valid[b, :len(chosen)] = True
    return roots.flatten(1), valid


@torch.no_grad()
def rollout_trees(target, head, text, roots, shape, aggregator="lse", eta=1.0):
    """Draft a tree with `head` behind every root and let the target score it. roots [B, R] slots -> Trees."""
    B, R = roots.shape
    hidden, kv = head.read(text.features, text.tokens)
    sequence, slot = torch.arange(B, device=roots.device).repeat_interleave(R), roots.flatten()   # [B * R]
    length = slot + 1                                                                 # true slots, before the root
    tree = draft_tree(head, hidden[sequence, slot], text.tokens[sequence, length], Prefix(kv, length, sequence),
                      shape, temperature=1.0)
    choice, log_prob = score_inner_nodes(target, tree, Prefix(text.kv, length, sequence))        # [B * R, N]
    _, _, reward = tree_reward(log_prob, tree.parents, tree.mask, aggregator, eta)    # [B * R]
    path, num_accepted, _ = accept(tree, choice, shape.depth + 1)
    rejected = torch.arange(shape.depth, device=roots.device) >= num_accepted[:, None]
    accepted = tree.tokens.gather(1, path)[:, 1:].masked_fill(rejected, 0)            # [B * R, depth]
    return Trees(reward.view(B, R), accepted.view(B, R, -1), num_accepted.view(B, R))


def score_inner_nodes(target, tree, prefix, temperature=0.0):
    """`score_nodes` of a tree, by a target forward over its inner nodes alone, half of them all: how likely a leaf is,
    its parent says. The choice at a leaf is not to be used."""
    inner = torch.zeros_like(tree.mask[:, 0]).scatter(1, tree.parents, True)          # [B, N]
    width, slot = int(inner.sum(1).max()), inner.cumsum(1) - 1                        # slot: where an inner node goes
    nodes = inner.byte().argsort(dim=1, descending=True, stable=True)[:, :width]      # [B, W], leaves fill it up
    mask = rows(rows(tree.mask, nodes).mT, nodes).mT                                  # [B, W, W]
    positions, uniform = prefix.length[:, None] + rows(tree.depth, nodes), torch.rand_like(nodes, dtype=torch.float)
    hidden, *_ = target(rows(tree.tokens, nodes), positions, mask, prefix, keep_kv=False)
    choice, log_prob = score_nodes(target.logits(hidden), tree.tokens, rows(slot, tree.parents), temperature, uniform)
    return rows(choice, slot), log_prob


def tree_reward(log_prob, parents, mask, aggregator="lse", eta=1.0):
    """How much of a drafted tree the target would accept, eq. 3-5.

    log_prob [B, N]  log T(token of the node | its ancestors), 0 for the root, as `score_nodes` returns it
    parents  [B, N]; mask [B, N, N] bool, ancestors and self
    aggregator       of the paths: "lse" (1/eta log sum exp(eta L)), "max" or "mean"; "expected": what a sampling target
                     accepts on average, the sum of P over all nodes but the root
    Returns P [B, N], the probability of each node's path; L [B, N], the sum of P along it; the reward R [B]. float32"""
    # `where`, not a product with the mask: log T may be -inf, and 0 * -inf is NaN.
    P = torch.where(mask, log_prob.float()[:, None], 0.0).sum(-1).exp()               # eq. 4, 1 for the root
    L = torch.where(mask, P[:, None], 0.0).sum(-1) - 1                                # eq. 3, without the root
    if aggregator == "expected":
        return P, L, P[:, 1:].sum(-1)
    leaf = torch.ones_like(mask[:, 0]).scatter(1, parents[:, 1:], False)              # [B, N]
    if aggregator == "max":
        return P, L, L.masked_fill(~leaf, float("-inf")).amax(-1)
    if aggregator == "mean":
        return P, L, L.masked_fill(~leaf, 0.0).sum(-1) / leaf.sum(-1)
    return P, L, (eta * L).masked_fill(~leaf, float("-inf")).logsumexp(-1) / eta      # eq. 5


def sequence_log_prob(head, text, roots, trees):
    """log M(S | prefix) of every root's longest accepted sequence, [B, R]. With gradient, unless under no_grad."""
    hidden = head.unroll(text.features, text.tokens, roots, trees.accepted[..., :-1])  # [B, R, depth, dim]
    log_q = torch.log_softmax(head.logits(hidden).float(), dim=-1)                    # [B, R, depth, V']
    draft_id = torch.zeros(head.config.vocab_size, dtype=torch.long, device=roots.device)
    draft_id[head.token_ids] = torch.arange(len(head.token_ids), device=roots.device)
    log_q = log_q.gather(-1, draft_id[trees.accepted][..., None]).squeeze(-1)         # [B, R, depth]
    inside = torch.arange(log_q.shape[-1], device=roots.device) < trees.length[..., None]
    return log_q.masked_fill(~inside, 0.0).sum(-1)
