"""Phase II's experience: draft trees at groups of positions of a text, and what the target makes of them.
Nothing here but `sequence_log_prob` carries a gradient. All trees of a batch are drafted and verified side by side."""
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
    """One drafted tree for every root, m of each of K groups of neighbours."""
    reward: torch.Tensor      # [B, K, m]
    accepted: torch.Tensor    # [B, K, m, depth] token ids of the longest accepted sequence, padded with 0
    length: torch.Tensor      # [B, K, m] its length, may be 0


@torch.no_grad()
def target_forward(target, tokens):
    """tokens [B, T] -> Text, of which all tokens are to be learnt."""
    hidden, features, keys, values = target(tokens)
    kv = KV([k.contiguous() for k in keys], [v.contiguous() for v in values])         # not views of wider projections
    choice = torch.stack([target.logits(row).argmax(-1) for row in hidden])           # not the logits of all at once
    return Text(tokens, features, hidden, choice, kv, torch.ones_like(tokens, dtype=torch.bool))


def sample_groups(supervised, groups, size, depth, generator):
    """Root slots of K non-overlapping groups of m adjacent positions of each text, supervised [B, T] on the CPU.
    A root slot r has its root token at r + 1: it and the next are supervised, and `depth` more tokens follow. Returns
    roots [B, K, m] and valid [B, K] bool, False for what fills up a text with room for fewer groups."""
    roots = torch.zeros(len(supervised), groups, size, dtype=torch.long)
    valid = torch.zeros(len(supervised), groups, dtype=torch.bool)
    usable = (supervised[:, 1:-1] & supervised[:, 2:])[:, :max(supervised.shape[1] - 1 - depth, 0)]   # [B, slots]
    for b, row in enumerate(usable):
        offset = int(torch.randint(max(min(size, len(row)), 1), (1,), generator=generator))
        blocks = row[offset:len(row) - (len(row) - offset) % size].view(-1, size).all(1).nonzero().squeeze(1)
        chosen = blocks[torch.randperm(len(blocks), generator=generator)[:groups].sort().values]
        roots[b, :len(chosen)] = offset + chosen[:, None] * size + torch.arange(size)
        valid[b, :len(chosen)] = True
    return roots, valid


@torch.no_grad()
def rollout_trees(target, heads, text, roots, shape, aggregator="lse", eta=1.0):
    """Let every head draft a tree behind every root, the target score them all. roots [B, K, m] -> [Trees] by head."""
    B, K, m = roots.shape
    sequence, length = torch.arange(B, device=roots.device).repeat_interleave(K * m), roots.flatten() + 1
    drafts, kv = [], text.kv or target_forward(target, text.tokens).kv
    for head in heads:
        hidden, own_kv = head.read(text.features, text.tokens)                        # true slots, before the root
        drafts.append(draft_tree(head, hidden[sequence, length - 1], text.tokens[sequence, length],
                                 Prefix(own_kv, length, sequence), shape, temperature=1.0))
    tree = Tree(*map(torch.cat, zip(*drafts)))                                        # [H * B * K * m, ...]
    choice, log_prob = score_inner_nodes(target, tree, Prefix(kv, length[::m], sequence[::m]), neighbours=m)
    _, _, reward = tree_reward(log_prob, tree.parents, tree.mask, aggregator, eta)    # [H * B * K * m]
    path, num_accepted, _ = accept(tree, choice, shape.depth + 1)
    inside = torch.arange(shape.depth, device=roots.device) < num_accepted[:, None]   # [H * B * K * m, depth]
    trees = reward, tree.tokens.gather(1, path)[:, 1:] * inside, num_accepted
    return list(map(Trees, *(x.unflatten(0, (len(heads), *roots.shape)) for x in trees)))


def score_inner_nodes(target, tree, prefix, temperature=0.0, neighbours=1):
    """`score_nodes` of trees, by a target forward over fewer nodes: how likely a leaf is, half of them all, its parent
    says, and what the trees of a group share is run once. The choice at a leaf is not to be used. A group's trees stand
    behind as many neighbouring tokens of a text, from `prefix` [G] on, and become one tree: the text is a path in it.
    tree [H * G * neighbours]: those of H heads one after another."""
    groups, at, device = [{} for _ in prefix.length], [], tree.tokens.device
    for b, (tokens, parents) in enumerate(zip(tree.tokens.tolist(), tree.parents.tolist())):
        group, inner = groups[b // neighbours % len(groups)], set(parents)            # {(parent, token): node}
        at.append([group.setdefault((at[-1][0] if b % neighbours else -1, tokens[0]), len(group))])
        for i in range(1, len(tokens)):
            at[b].append(group.setdefault((at[b][parents[i]], tokens[i]), len(group)) if i in inner else 0)
    nodes = torch.nn.utils.rnn.pad_sequence([torch.tensor(list(group)) for group in groups], batch_first=True)
    parents, tokens = nodes.clamp(min=0).to(device).unbind(-1)                        # [G, W]
    mask, uniform = ancestor_mask(parents, tokens.shape[1]), torch.rand(1, tokens.numel(), device=device)
    hidden, *_ = target(tokens, prefix.length[:, None] + mask.sum(-1) - 1, mask, prefix, keep_kv=False)
    group = torch.arange(len(at), device=device) // neighbours % len(groups)
    at = torch.tensor(at, device=device) + group[:, None] * tokens.shape[1]           # [B, N] among all G * W
    choice, log_prob = score_nodes(target.logits(hidden).flatten(0, 1)[None], tree.tokens.view(1, -1),
                                   at.gather(1, tree.parents).view(1, -1), temperature, uniform)
    return choice[0, at], log_prob.view_as(at).index_fill(1, at.new_zeros(1), 0.0)


def tree_reward(log_prob, parents, mask, aggregator="lse", eta=1.0):
    """How much of a drafted tree the target would accept, eq. 3-5.
    log_prob [B, N]  log T(token of the node | its ancestors), 0 for the root; parents [B, N]
    mask [B, N, N]   bool, ancestors and self: for `where`, as log T may be -inf, and a product with 0 NaN
    aggregator       of the paths: "lse" (1/eta log sum exp(eta L)), "max" or "mean"; "expected": what a sampling target
                     accepts on average, the sum of P over all nodes but the root
    Returns P [B, N], the probability of each node's path; L [B, N], the sum of P along it; the reward R [B]. float32"""
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
    """log M(S | prefix) of every root's longest accepted sequence, [B, K, m]. With gradient, unless under no_grad."""
    accepted = trees.accepted.flatten(1, 2)                                           # [B, R, depth], R = K * m
    hidden = head.unroll(text.features, text.tokens, roots.flatten(1), accepted[..., :-1])    # [B, R, depth, dim]
    log_q = torch.log_softmax(head.logits(hidden).float(), dim=-1)                    # [B, R, depth, V']
    draft_id = (accepted[..., None] == head.token_ids).byte().argmax(-1, keepdim=True)        # [B, R, depth, 1]
    log_q = log_q.gather(-1, draft_id).view_as(trees.accepted)                        # [B, K, m, depth]
    inside = torch.arange(log_q.shape[-1], device=roots.device) < trees.length[..., None]
    return log_q.masked_fill(~inside, 0.0).sum(-1)
