"""How much there is to gain: what no training of the head, or no better ranking of its candidates, can exceed."""
import torch

from gto.candidates import path_log_prob
from gto.fixed_text import read_by, walk
from gto.model import Prefix
from gto.tree import draft_candidates, draft_tree, rerank

RANKS = (1, 2, 3, 4, 8, 16)            # the calibration table's rows end here, then at g and 2 g nodes


class TargetAsHead:
    """The target in the draft head's place: drafts with its own distribution. For `draft_tree`.

    Its "hidden states" are logits; its "keys and values" of the nodes drafted so far are these nodes themselves, which
    every further level runs again.
    """

    def __init__(self, target):
        self.target = target
        self.token_ids = torch.arange(target.config.vocab_size, device=target.norm.weight.device)

    def logits(self, hidden):
        return hidden

    def __call__(self, _, tokens, positions, seen, prefix, past):
        new = tokens.shape[1]
        if past is not None:
            tokens, positions = torch.cat([past[0], tokens], dim=1), torch.cat([past[1], positions], dim=1)
            seen = torch.cat([torch.nn.functional.pad(past[2], (0, new)), seen], dim=1)   # older nodes see no newer one
        hidden, *_ = self.target(tokens, positions, seen, prefix)
        return self.target.logits(hidden[:, -new:]), tokens, positions, seen


def self_tau(target, fixed, shape, score_temp):
    """tau [B] if the target drafted for itself, with the same tree policy. (At T=0 this is levels + 1, or near it.)"""
    text, drafter = fixed.text, TargetAsHead(target)
    return walk(fixed, lambda rows, length: draft_tree(
        drafter, text.logits[rows, length], text.tokens[rows, length], Prefix(text.kv, length + 1, rows), shape,
        score_temp))


def rerank_tau(target, head, fixed, shape, score_temp, temperature):
    """tau [B] if of all the head's candidates those were kept that the target likes best."""
    text, (hidden, kv) = fixed.text, read_by(head, fixed.text)

    def draft(rows, length):
        root = text.tokens[rows, length]
        tokens, parents, _ = draft_candidates(head, hidden[rows, length - 1], Prefix(kv, length, rows), shape,
                                              score_temp)
        log_P = path_log_prob(target, root, tokens, parents, Prefix(text.kv, length, rows), shape, temperature)
        return rerank(root, tokens, parents, log_P, shape)

    return walk(fixed, draft)


@torch.no_grad()
def calibration(target, head, fixed, shape, score_temp, temperature, every=16):
    """What the scores promise against what the target accepts, at every 16th place of the texts.

    Returns [(first rank, last rank, mean exp(score), mean probability that the node is accepted)].
    """
    text, (hidden, kv) = fixed.text, read_by(head, fixed.text)
    said, true = [], []
    for offset in range(0, int((fixed.stop - fixed.start).min()), every):
        rows, length = torch.arange(len(fixed.start), device=fixed.start.device), fixed.start + offset
        tokens, parents, scores = draft_candidates(head, hidden[rows, length - 1], Prefix(kv, length, rows), shape,
                                                   score_temp)
        log_P = path_log_prob(target, text.tokens[rows, length], tokens, parents, Prefix(text.kv, length, rows), shape,
                              temperature)
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        said.append(scores.exp()), true.append(log_P.gather(1, order).exp())
    said, true = torch.cat(said).mean(0), torch.cat(true).mean(0)                     # [C]
    last = sorted({*(r for r in RANKS if r < shape.nodes), shape.nodes, min(2 * shape.nodes, len(said))})
    return [(a + 1, b, said[a:b].mean().item(), true[a:b].mean().item()) for a, b in zip([0, *last], last)]
