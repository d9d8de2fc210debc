"""The losses: token-level training (phase I) and Group Tree Optimization (phase II), one equation a function.

Swap one function and you have another method: the reward's aggregator is in `kernels.acceptance.tree_reward`
(eq. 3-5); what a reward is compared with is in `debias` and `advantages`; what the gradient flows through is in
`ratio` and `surrogate`. The last four functions are objectives that do without rewards and ratios.
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


def token_loss(log_q, labels, weight, total=None, decay=0.8):
    """EAGLE-3's training-time test: soft cross-entropy of the target's and the head's distribution at every step.

    log_q, labels  [B, R, J, V'] over the draft vocabulary, at step j of the unroll
    weight         [B, R, J]     1 where supervised, 0 elsewhere: the mean is over supervised places only
    total          [J]           what to divide by instead, if this is a part of a batch: its parts' mean count
    decay                        weight of step j is decay ** j, as in EAGLE-3's code
    """
    cross_entropy = -(labels * log_q).sum(-1) * weight                                # [B, R, J]
    total = weight.sum((0, 1)) if total is None else total
    per_step = cross_entropy.sum((0, 1)) / total.clamp(min=1)                         # [J]
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


# Beside GTO: objectives with a gradient of their own, minus an expected number of accepted drafts ------------------

def chain_loss(log_q, labels, weight):
    """"tv": drafts sampled along a chain. One is accepted with probability sum_x min(p(x), q(x)) = 1 - TV(p, q) and
    counts if all before it were. log_q, labels [B, R, J, V'], weight [B, R, J] as in `token_loss` -> scalar."""
    accepted = torch.minimum(labels, log_q.exp()).sum(-1) * weight                    # [B, R, J]
    return -accepted.cumprod(-1).sum(-1).mean()


def keep_loss(log_q, labels, on_path, threshold=-5.0, width=1.0, temperature=0.7):
    """"keep": how much of the target's greedy path the re-ranking keeps, without drafting a tree.

    A step's path score is compared with that of the last node a tree keeps, taken for a constant, and the step function
    is made soft. As in acceptance, a step counts only with all before it; one far above the cut gets no gradient.
    log_q, labels [B, R, J, V'] as in `token_loss`; on_path [B, R, J] bool: the chain so far is the target's own choice
    and can be drafted; threshold, width in nats; temperature of the scores -> scalar
    """
    score = torch.log_softmax(log_q / temperature, -1).gather(-1, labels.argmax(-1, keepdim=True)).squeeze(-1)
    path = score.masked_fill(~on_path, 0.0).cumsum(-1)                                # [B, R, J]
    return -(torch.sigmoid((path - threshold) / width) * on_path).sum(-1).mean()


def cut_loss(scores, P, nodes, width=0.5):
    """"cut": the kept tree's expected acceptance, sum of P over its nodes, with the re-ranking's cut made soft.

    Node j is kept with w_j = sigmoid((s_j - threshold) / width); the threshold moves so that always `nodes` are kept,
    which brings in the baseline: nodes compete, and only what is better than the others at the cut should rise.
    scores, P [N, C]: a candidate's draft score s, with gradient, and the target's probability of its path -> scalar
    """
    s = scores.detach()
    around = s.topk(nodes + 1, dim=1).values[:, -2:]                                  # the last kept, the first dropped
    w = torch.sigmoid((s - around.mean(1, keepdim=True)) / width)
    slope = w * (1 - w) / width                                                       # dw / ds, at a fixed threshold
    baseline = (slope * P).sum(1, keepdim=True) / slope.sum(1, keepdim=True).clamp(min=1e-9)
    return -(slope * (P - baseline) * scores).sum(1).mean()


def distill_loss(scores, P, parents):
    """"distill": cross-entropy at every node that the tree really visits, weighted by the target's way there.

    scores, P [N, C] as in `cut_loss`; parents [N, C] candidate index + 1, 0: the root. A child's score minus its
    parent's is log M(child | path); its P is the parent's times T(child | path): the node's weight and the label in one.
    """
    above = torch.nn.functional.pad(scores, (1, 0)).gather(1, parents)
    return -(P * (scores - above)).sum(1).mean()
