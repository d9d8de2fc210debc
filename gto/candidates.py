"""What the target thinks of all candidates of a draft, those that the re-ranking drops too.

A draft has one candidate per proposed token: k at the first level, k * k at every further one. They stand in groups of
k siblings, so candidate c is a child of *inner node* c // k: the root is inner node 0, then come the expanded nodes.
"""
import torch

from gto.tree import ancestor_mask


@torch.no_grad()
def path_log_prob(target, root, tokens, parents, prefix, shape, temperature):
    """Log-probability that the target, decoding at `temperature`, goes down the path to each candidate. -> [B, C].

    root [B]; tokens, parents [B, C]; prefix: the target's, up to but not with the root. At T=0 it is 0 on the greedy
    path and -inf off it. One target forward over the inner nodes, 1 + (levels - 1) * k of them: leaves need none.
    """
    B, k = len(root), shape.branch
    inner = parents[:, ::k]                                                           # [B, I] candidate index + 1
    inner_parents = ((inner - 1) // k).clamp(min=0)                                   # [B, I] index among inner nodes
    inner_tokens = torch.cat([root[:, None], tokens], dim=1).gather(1, inner)
    mask = ancestor_mask(inner_parents, shape.levels)                                 # [B, I, I]
    hidden, *_ = target(inner_tokens, prefix.length[:, None] + mask.sum(-1) - 1, mask, prefix, keep_kv=False)
    logits = target.logits(hidden).float()                                            # [B, I, V]
    children = tokens.view(B, -1, k)                                                  # [B, I, k]
    if temperature == 0:
        step = torch.where(children == logits.argmax(-1, keepdim=True), 0.0, float("-inf"))
    else:
        logits = logits / temperature
        step = logits.gather(2, children) - logits.logsumexp(-1, keepdim=True)
    own = torch.nn.functional.pad(step.flatten(1), (1, 0)).gather(1, inner)           # [B, I] the last step to each
    path = torch.where(mask, own[:, None], 0.0).sum(-1)                               # [B, I]
    return (path[..., None] + step).flatten(1)
