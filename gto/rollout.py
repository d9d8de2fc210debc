"""Phase II's experience: draft trees at groups of positions of a text, and what the target makes of them.

Nothing here but `sequence_log_prob` carries a gradient. All trees of a batch are drafted and verified side by side and
share their sequence's keys and values: a tree names its cache row and how much of it it sees."""
from typing import NamedTuple

import torch

from gto.model import KV, Prefix
from gto.tree import Tree, ancestor_mask, draft_tree
from gto.verify import accept
from kernels.acceptance import score_nodes


class Text(NamedTuple):
    """A batch of sequences as the frozen target sees it."""
    tokens: torch.Tensor      # [B, T]
    features: torch.Tensor    # [B, T, 3 * dim]
    hidden: torch.Tensor      # [B, T, dim] behind the last norm, for `target.logits`
    choice: torch.Tensor      # [B, T] the likeliest next token
    kv: KV | None             # None: not kept
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
def rollout_trees(target, heads, text, roots, shape, aggregator="lse", eta=1.0):
    """Let every head draft a tree behind every root, and the target score all of them. roots [B, K, m] slots of groups
    of neighbours -> [Trees] by head, R = K * m."""
    (B, K, m), H = roots.shape, len(heads)
    group, length = torch.arange(B * K, device=roots.device).repeat_interleave(m), roots.flatten() + 1    # [B * R]
    sequence, drafts = group // K, []
    for head in heads:
        hidden, kv = head.read(text.features, text.tokens)
        drafts.append(draft_tree(head, hidden[sequence, length - 1], text.tokens[sequence, length],
                                 Prefix(kv, length, sequence), shape, temperature=1.0))   # true slots, before the root
    tree, prefix = Tree(*map(torch.cat, zip(*drafts))), Prefix(text.kv, length.repeat(H), sequence.repeat(H))
    choice, log_prob = score_inner_nodes(target, tree, prefix, group=group.repeat(H))             # [H * B * R, N]
    _, _, reward = tree_reward(log_prob, tree.parents, tree.mask, aggregator, eta)    # [H * B * R]
    path, num_accepted, _ = accept(tree, choice, shape.depth + 1)
    rejected = torch.arange(shape.depth, device=roots.device) >= num_accepted[:, None]
    accepted = tree.tokens.gather(1, path)[:, 1:].masked_fill(rejected, 0)            # [H * B * R, depth]
    return list(map(Trees, *(x.unflatten(0, (H, B, K * m)) for x in (reward, accepted, num_accepted))))


def score_inner_nodes(target, tree, prefix, temperature=0.0, group=None):
    """`score_nodes` of trees by a target forward over fewer nodes: without the leaves, half of them all, as how likely
    a leaf is, its parent says; and with nodes that trees of a group, see `merge`, have in common only once. group [B],
    None: each tree is one. The choice at a leaf is not to be used."""
    group = torch.arange(len(tree.tokens), device=tree.tokens.device) if group is None else group
    merged, first, at = merge(*(x.tolist() for x in (group, prefix.length, tree.tokens, tree.parents)))
    width = max(map(len, merged))                                                     # W
    padded = [list(nodes) + [(0, 0)] * (width - len(nodes)) for nodes in merged]
    parents, tokens = torch.tensor(padded, device=group.device).clamp(min=0).unbind(-1)           # [G, W]
    mask, uniform = ancestor_mask(parents, width), torch.rand(1, tokens.numel(), device=group.device)
    prefix = prefix._replace(length=prefix.length[first], sequence=first if prefix.sequence is None else
                             prefix.sequence[first])
    hidden, *_ = target(tokens, prefix.length[:, None] + mask.sum(-1) - 1, mask, prefix, keep_kv=False)
    at = group[:, None] * width + torch.tensor(at, device=group.device)               # [B, N] among all G * W nodes
    choice, log_prob = score_nodes(target.logits(hidden).flatten(0, 1)[None], tree.tokens.view(1, -1),
                                   at.gather(1, tree.parents).view(1, -1), temperature, uniform)
    return choice[0, at], log_prob.view_as(at).index_fill(1, at.new_zeros(1), 0.0)


def merge(group, roots, tokens, parents):
    """Trees of a group as one without leaves, by lists: of each tree its group, 0 onwards; the position of its root, in
    a group no more than one behind those before; the tokens and parents of its nodes. -> of each group its nodes as
    {(parent, token): number} and its first tree; of each tree the numbers of its nodes, 0 for leaves."""
    merged, first, at, text = [], [], [], {}
    for b, (g, root, words, above) in enumerate(zip(group, roots, tokens, parents)):
        if g == len(merged):
            merged.append({}), first.append(b)
        nodes, inner = merged[g], set(above)
        text[g, root] = nodes.setdefault((text.get((g, root - 1), -1), words[0]), len(nodes))
        at.append([text[g, root]])
        for i in range(1, len(words)):
            at[b].append(nodes.setdefault((at[b][above[i]], words[i]), len(nodes)) if i in inner else 0)
    return merged, first, at


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
