"""What phase II can train for besides Group Tree Optimization: the expected acceptance itself, on the tree's candidates."""
import torch

from gto.candidates import path_log_prob
from gto.loss import cut_loss, distill_loss
from gto.model import KV, Prefix
from gto.rollout import sample_groups
from gto.tree import TreeShape, draft_candidates, score_temperature


def candidate_loss(config, target, head, text, generator):
    """The loss "cut" or "distill" of one batch, at `config.groups` random prefixes of each text. Returns (loss, figures).

    Trees are drafted with gradient, at the score temperature that decoding at `config.reward_temperature` would use.
    """
    shape, temperature = TreeShape.parse(config.tree), config.reward_temperature
    tokens, (B, T), device = text.tokens, text.tokens.shape, text.tokens.device
    slots = torch.arange(T, device=device).expand(B, T)
    hidden, k, v = head(head.fuse(text.features), tokens.roll(-1, dims=1), slots)     # the last slot is never used
    slot = sample_groups(T, config.groups, 1, shape.levels, generator).to(device).repeat(B)   # [N]
    sequence, length = torch.arange(B, device=device).repeat_interleave(len(slot) // B), slot + 1
    drafted, parents, scores = draft_candidates(head, hidden[sequence, slot], Prefix(KV([k], [v]), length, sequence),
                                                shape, score_temperature(temperature))
    P = path_log_prob(target, tokens[sequence, length], drafted, parents, Prefix(text.kv, length, sequence), shape,
                      temperature).exp()                                              # [N, C]
    loss = cut_loss(scores, P, shape.nodes) if config.objective == "cut" else distill_loss(scores, P, parents)
    kept = scores.detach().topk(shape.nodes, dim=1).indices
    return loss, {"expected": P.gather(1, kept).sum(1).mean(), "possible": P.topk(shape.nodes, dim=1).values.sum(1).mean()}
