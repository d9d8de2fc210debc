"""The losses: token-level training (phase I), objectives of phase II, one equation a function; eq. 3-5: gto/rollout.py.
For one of your own, write a function like `keep_objective` and name it in OBJECTIVES, for `--objectives gto,mine`."""
from typing import NamedTuple

import torch
from torch.nn import functional as F

from gto.config import Config
from gto.head import DraftHead
from gto.model import Target
from gto.rollout import Text, rollout_trees, sequence_log_prob
from gto.tree import TreeShape


def soft_labels(target, text, token_ids, temperature=1.0):
    """What the head is taught: the target's distribution over the draft vocabulary, sharpened by a temperature below 1.
    text [B, T]; token_ids [V'] target id of every draft id -> labels [B, T, V'], teachable [B, T] bool: False where the
    draft vocabulary lacks the target's arg-max, as the renormalised label would teach another token."""
    logits = F.linear(text.hidden, target.unembed.weight[token_ids]).float()          # [B, T, V']
    return (logits / temperature).softmax(-1), torch.isin(text.choice, token_ids)


def token_loss(log_q, labels, weight, total=None, decay=0.8):
    """EAGLE-3's training-time test: soft cross-entropy of the target's and the head's distribution at every step.
    log_q, labels  [B, R, J, V'] over the draft vocabulary, at step j of the unroll, which weighs decay ** j (EAGLE-3)
    weight         [B, R, J]     1 where supervised, 0 elsewhere: the mean is over supervised positions only
    total          [J]           what to divide by instead, if this is a part of a batch: its parts' mean count"""
    cross_entropy = -(labels * log_q).sum(-1) * weight                                # [B, R, J]
    total = weight.sum((0, 1)) if total is None else total
    per_step = cross_entropy.sum((0, 1)) / total.clamp(min=1)                         # [J]
    steps = decay ** torch.arange(len(per_step), device=per_step.device)
    return (per_step * steps).sum() / steps.sum()


def unroll_text(config, target, head, text):
    """A chain along the true text from every slot, from the first that has something to learn in any text to the last
    whose chain fits. -> log_q, labels [B, R, J+1, V'] and weight [B, R, J+1] bool, see `token_loss`."""
    (B, T), J = text.tokens.shape, config.unroll
    learnt = learnt_positions(text.supervised, J)                                     # [B, T-J-2, J+1]
    first = int(learnt[..., 0].any(0).byte().argmax())
    slots = torch.arange(first, T - J - 2, device=text.tokens.device)                 # [R]
    # Root slot r predicts token r+2, step j token r+2+j; the target's distribution of it stands at r+1+j.
    positions = slots[:, None] + torch.arange(J + 1, device=slots.device)             # [R, J+1]
    chains = text.tokens[:, positions[:, :-1] + 2]                                    # [B, R, J]
    hidden = head.unroll(text.features, text.tokens, slots.expand(B, -1), chains)
    log_q = torch.log_softmax(head.logits(hidden).float(), dim=-1)                    # [B, R, J+1, V']
    labels, teachable = soft_labels(target, text, head.token_ids, config.label_temperature)
    return log_q, labels[:, positions + 1], teachable[:, positions + 1] & learnt[:, first:]


def learnt_positions(supervised, unroll):
    """Which steps of which chains are learnt, [B, T] -> [B, R, J+1] bool: those whose tokens from the root to the
    predicted one are all supervised. In decoding a draft never begins in a question either."""
    chains = supervised[:, 1:].unfold(1, unroll + 2, 1)                               # [B, R, J+2], with root
    return chains.cumprod(-1)[..., 1:].bool()


def debias(reward, reference_reward):
    """Eq. 9: what the head's tree earns beyond the frozen reference head's: some prefixes are easy for any head."""
    return reward - reference_reward


def advantages(reward, delta):
    """Eq. 10: standardised within each group of m adjacent prefixes. reward [B, K, m] -> [B, K, m]."""
    centred = reward - reward.mean(-1, keepdim=True)
    return centred / (reward.std(-1, correction=0, keepdim=True) + delta)


def ratio(log_q, reference_log_q, length):
    """Eq. 11: how much likelier than the reference the head drafts the longest accepted sequence, per token. log_q,
    reference_log_q [...] sums over the sequence; length [...] its number of tokens, may be 0."""
    return ((log_q - reference_log_q) / length.clamp(min=1)).exp()


def surrogate(s, advantage, eps):
    """Eq. 12: PPO's clipped objective, as a loss; s, advantage [B, K, m] -> scalar, the mean over groups, positions."""
    return -torch.minimum(s * advantage, s.clamp(1 - eps, 1 + eps) * advantage).mean()


class Batch(NamedTuple):
    """What an objective of phase II may use. L = L_token + omega * objective(batch)[0] is averaged over the parts."""
    config: Config
    target: Target              # frozen
    head: DraftHead             # the one that learns
    reference: DraftHead        # frozen: the head as phase I left it
    text: Text
    log_q: torch.Tensor         # [B, R, J+1, V'] the head along the text, unrolled, with gradient (as in `token_loss`)
    labels: torch.Tensor        # [B, R, J+1, V']
    weight: torch.Tensor        # [B, R, J+1] bool: supervised
    total: torch.Tensor         # [J+1] supervised positions of a whole step, over the number of its parts
    roots: torch.Tensor         # [B, K, m] root slots of the groups
    group_weight: torch.Tensor  # [B, K] of each group in the mean, 0 where there is none
    kept: list                  # what an objective keeps for its next steps: empty in every `rollout_steps`-th


def gto_objective(batch):
    """Eq. 3-12. Trees serve `rollout_steps` steps, as in PPO; but the ratio and its clip are against the reference, as
    in the paper, not against the head that drafted them. -> loss, metrics to log."""
    if not batch.kept:
        batch.kept.extend(rollout(batch))
    text, roots, trees, reference_log_q, advantage, metrics = batch.kept
    log_q = sequence_log_prob(batch.head, text, roots, trees)                         # [B, K, m], with gradient
    return surrogate(ratio(log_q, reference_log_q, trees.length), advantage, batch.config.eps), metrics


@torch.no_grad()
def rollout(batch):
    """Trees of both heads at groups of positions, rewarded by the target: what of GTO carries no gradient."""
    config, text, roots, shape = batch.config, batch.text, batch.roots, TreeShape.parse(batch.config.tree)
    trees, reference_trees = rollout_trees(batch.target, (batch.head, batch.reference), text, roots, shape,
                                           config.aggregator, config.eta)             # [B, K, m]
    reference_log_q = sequence_log_prob(batch.reference, text, roots, trees)
    gain = debias(trees.reward, reference_trees.reward) if config.debias else trees.reward
    weight = batch.group_weight[..., None] * batch.group_weight.numel()               # `surrogate` is linear in A
    advantage = advantages(gain, config.delta) * weight
    metrics = {"reward": trees.reward, "gain": gain, "accepted": trees.length}
    metrics = {name: (value * weight).mean() for name, value in metrics.items()}
    return text._replace(kv=None), roots, trees, reference_log_q, advantage, metrics


def keep_objective(batch, threshold=-5.0, width=1.0, temperature=0.7, weight=6.0):
    """How much of the target's greedy path the re-ranking keeps, without drafting a tree. -> loss, metrics.
    A step's path score, at a temperature, is compared with that of the last node a tree keeps, a constant threshold, by
    a sigmoid of this width (nats). A step counts only with all before it; far above the cut it gets no gradient."""
    text, (_, R, steps) = batch.text, batch.weight.shape
    own = text.choice[:, :-1] == text.tokens[:, 1:]                                   # [B, T-1] t+1 is its own choice
    own = own[:, 1 - steps - R:-1].unfold(1, steps - 1, 1)                            # [B, R, J] by chain
    on_path = (F.pad(own, (1, 0), value=True) & batch.weight).cumprod(-1).bool()      # [B, R, J+1] all so far
    best = batch.labels.argmax(-1, keepdim=True)
    score = torch.log_softmax(batch.log_q / temperature, -1).gather(-1, best).squeeze(-1)
    path = score.masked_fill(~on_path, 0.0).cumsum(-1)                                # [B, R, J+1]
    return -weight * (torch.sigmoid((path - threshold) / width) * on_path).sum() / batch.total[0], {}


OBJECTIVES = {"gto": gto_objective, "keep": keep_objective}
