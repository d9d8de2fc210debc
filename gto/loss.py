"""The losses: token-level training (phase I) and Group Tree Optimization (phase II), one equation a function.

Swap one function and you have another method: the reward's aggregator is in `kernels.acceptance.tree_reward`
(eq. 3-5); what a reward is compared with is in `debias` and `advantages`; what the gradient flows through is in
`ratio` and `surrogate`.
"""
import torch


def soft_labels(target_logits, token_ids, temperature=1.0):
    """What the head is taught: the target's distribution over the draft vocabulary.

    target_logits [B, T, V]; token_ids [V'] target id of every draft id; temperature below 1 sharpens towards the arg-max.
    Returns labels [B, T, V'] and teachable [B, T] bool: False where the draft vocabulary lacks the target's arg-max,
    because there the renormalised label would teach another token.
    """
    labels = (target_logits.float()[..., token_ids] / temperature).softmax(-1)
    return labels, torch.isin(target_logits.argmax(-1), token_ids)


def token_loss(log_q, labels, weight, decay=0.8):
    """EAGLE-3's training-time test: soft cross-entropy of the target's and the head's distribution at every step.

    log_q, labels  [B, R, J, V'] over the draft vocabulary, at step j of the unroll
    weight         [B, R, J]     1 where supervised, 0 elsewhere: the mean is over supervised places only
    decay                        weight of step j is decay ** j, as in EAGLE-3's code
    """
    cross_entropy = -(labels * log_q).sum(-1) * weight                                # [B, R, J]
    per_step = cross_entropy.sum((0, 1)) / weight.sum((0, 1)).clamp(min=1)            # [J]
    steps = decay ** torch.arange(len(per_step), device=per_step.device)
    return (per_step * steps).sum() / steps.sum()


def debias(reward, reference_reward):
    """Eq. 9: what the head's tree earns beyond the frozen reference head's, at the same prefix. [B, K, m] each.

    Some prefixes are easy for any head; the difference is what this head is responsible for.
    """
    return reward - reference_reward


def advantages(reward, delta):
    """Eq. 10: standardised within each group of m adjacent prefixes. reward [B, K, m] -> [B, K, m]."""
    centred = reward - reward.mean(-1, keepdim=True)
    return centred / (reward.std(-1, correction=0, keepdim=True) + delta)


def ratio(log_q, reference_log_q, length):
    """Eq. 11: how much likelier than the reference the head drafts the longest accepted sequence, per token.

    log_q, reference_log_q [...] sums over the sequence; length [...] its number of tokens, may be 0.
    """
    return ((log_q - reference_log_q) / length.clamp(min=1)).exp()


def surrogate(s, advantage, eps):
    """Eq. 12: PPO's clipped objective, as a loss; s, advantage [B, K, m] -> scalar, the mean over groups and places."""
    return -torch.minimum(s * advantage, s.clamp(1 - eps, 1 + eps) * advantage).mean()
