"""What phase II can train for besides Group Tree Optimization: expected acceptance itself, on a tree's candidates."""
import torch

from gto.candidates import path_log_prob
from gto.loss import cut_loss, distill_loss
from gto.model import KV, Prefix
from gto.tree import TreeShape, draft_candidates, score_temperature


def candidate_loss(config, target, head, text, roots, weight):
    """The loss "cut" or "distill" of one batch, at prefixes given by their root slots. Returns (loss, figures).

    roots [B, K]; weight [B, K] of each in the mean, 0 where there is none.
    Trees are drafted with gradient, at the score temperature that decoding at `config.reward_temperature` would use.
    """
    shape, temperature = TreeShape.parse(config.tree), config.reward_temperature
    tokens, (B, T), device = text.tokens, text.tokens.shape, text.tokens.device
    slots = torch.arange(T, device=device).expand(B, T)
    hidden, k, v = head(head.fuse(text.features), tokens.roll(-1, dims=1), slots)     # the last slot is never used
    slot, weight = roots.flatten(), weight.flatten()                                  # [N]
    sequence, length = torch.arange(B, device=device).repeat_interleave(roots.shape[1]), slot + 1
    drafted, parents, scores = draft_candidates(head, hidden[sequence, slot], Prefix(KV([k], [v]), length, sequence),
                                                shape, score_temperature(temperature))
    P = path_log_prob(target, tokens[sequence, length], drafted, parents, Prefix(text.kv, length, sequence), shape,
                      temperature).exp()                                              # [N, C]
    weighted = P * weight[:, None] * len(weight)                                      # both losses are linear in P
    if config.objective == "cut":
        loss = cut_loss(scores, weighted, shape.nodes)
    else:
        loss = distill_loss(scores, weighted, parents)
    kept = scores.detach().topk(shape.nodes, dim=1).indices
    return loss, {"expected": (P.gather(1, kept).sum(1) * weight).sum(),
                  "possible": (P.topk(shape.nodes, dim=1).values.sum(1) * weight).sum()}
