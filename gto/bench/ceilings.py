"""How much there is to gain: what no training of the head, or no better ranking of its candidates, can exceed."""
import torch
from torch.nn import functional as F

from gto.evaluate import replay_text, tau
from gto.model import Prefix
from gto.page import path_log_prob
from gto.tree import draft_candidates, draft_tree, rerank


class TargetAsHead:
    """The target in the draft head's place, for `draft_tree`: drafts with its own distribution. Its "hidden states" are
    logits, its "keys and values" the nodes drafted so far themselves, which every further level runs again."""

    def __init__(self, target):
        self.target = target
        self.token_ids = torch.arange(target.config.vocab_size, device=target.norm.weight.device)

    def logits(self, hidden):
        return hidden

    def __call__(self, _, tokens, positions, seen, prefix, past):
        new = tokens.shape[1]
        if past is not None:
            tokens, positions = torch.cat([past[0], tokens], dim=1), torch.cat([past[1], positions], dim=1)
            seen = torch.cat([F.pad(past[2], (0, new)), seen], dim=1)                 # older nodes see no newer one
        hidden, *_ = self.target(tokens, positions, seen, prefix)
        return self.target.logits(hidden[:, -new:]), tokens, positions, seen


@torch.no_grad()
def ceilings(target, head, fixed, shape, score_temp, temperature):
    """A row of a table: the head's mean tau; what it were if of all its candidates those were kept that the target,
    decoding at `temperature`, likes best; and if the target drafted for itself (at T=0 that is depth + 1, or near it).
    Then, by rank of candidates, mean exp(score) / mean probability of acceptance: {"rank 5..8": "0.075 / 0.031"}."""
    text, drafter, promised, accepted = fixed.text, TargetAsHead(target), [], []
    hidden, kv = head.read(text.features, text.tokens)

    def ranked_by_target(rows, length):
        root, prefix = text.tokens[rows, length], Prefix(kv, length, rows)
        tokens, parents, scores = draft_candidates(head, hidden[rows, length - 1], prefix, shape, score_temp)
        log_P = path_log_prob(target, root, tokens, parents, Prefix(text.kv, length, rows), shape, temperature)
        ranked, order = scores.sort(dim=1, descending=True, stable=True)
        promised.append(ranked.exp()), accepted.append(log_P.gather(1, order).exp())  # [n, C]
        return rerank(root, tokens, parents, log_P, shape)

    def drafted_by_target(rows, length):
        root, prefix = text.tokens[rows, length], Prefix(text.kv, length + 1, rows)
        return draft_tree(drafter, target.logits(text.hidden[rows, length]), root, prefix, shape, temperature or 0.01)

    row = {"T": f"{temperature:g}", "score temp.": f"{score_temp:g}",
           "draft": tau(head, fixed, shape, score_temp).mean().item(),
           "its candidates, ranked by the target": replay_text(fixed, ranked_by_target).mean().item(),
           "the target drafts for itself": replay_text(fixed, drafted_by_target).mean().item()}
    said, true = torch.cat(promised).mean(0), torch.cat(accepted).mean(0)             # [C]
    return row | {f"rank {b // 2 + 1}..{b}": f"{said[b // 2:b].mean():.3f} / {true[b // 2:b].mean():.3f}"
                  for b in (1, 2, 4, 8, 16, 32, 64) if b <= len(said)}
