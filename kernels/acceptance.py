"""Acceptance scoring: from the target's logits at every tree node to the accepted path and the tree's reward."""
import torch

from kernels import use_triton


def score_nodes(logits, tokens=None, parents=None, temperature=0.0, uniform=None):
    """What the target chooses at every node, and what it thinks of every node's token.

    logits   [B, N, V]  the target's logits after each node; -inf masks a token out
    tokens   [B, N]     node tokens; node 0 is the root. None: only the choices are wanted, log_prob is None
    parents  [B, N]     index of each node's parent; the root is its own parent
    temperature         0: the choice is the arg-max (the lowest index among ties), and log_prob is at temperature 1;
                        otherwise both are at this temperature
    uniform  [B, N]     random numbers in [0, 1), one per node, needed where temperature > 0
    Returns  choice [B, N] int64, the target's next token after each node;
             log_prob [B, N] float32, log T(token of the node | prefix, ancestors); 0 for the root
    """
    run = score_nodes_triton if use_triton(logits) else score_nodes_reference
    return run(logits, tokens, parents, temperature, uniform)


def score_nodes_reference(logits, tokens=None, parents=None, temperature=0.0, uniform=None):
    if temperature == 0:
        choice = logits.argmax(-1)                                                    # [B, N]
    else:  # inverse CDF: the first token whose cumulated probability exceeds u times the total
        cumulated = (logits.float() / temperature).softmax(-1).cumsum(-1)             # [B, N, V]
        choice = torch.searchsorted(cumulated, uniform[..., None] * cumulated[..., -1:], right=True).squeeze(-1)
    if tokens is None:
        return choice, None
    log_p = torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)          # [B, N, V]
    log_prob = log_p[torch.arange(len(tokens), device=tokens.device)[:, None], parents, tokens]  # [B, N]
    return choice, log_prob.index_fill(1, torch.zeros(1, dtype=torch.long, device=tokens.device), 0.0)


def accept(tokens, parents, mask, choice, width):
    """The longest path of nodes that agree with the target's choices.

    tokens, parents, choice [B, N] as in `score_nodes`; mask [B, N, N] bool, ancestors and self
    width   P: room for the path, at least the tree's depth + 1
    Returns path [B, P] int64, node indices from the root (0) down the accepted path, padded with 0;
            count [B] int64, accepted nodes without the root; next_token [B], the target's choice at the last of them
    """
    run = accept_triton if use_triton(choice) else accept_reference
    return run(tokens, parents, mask, choice, width)


def accept_reference(tokens, parents, mask, choice, width):
    """No walk: a node is accepted if and only if it and all its ancestors match. Siblings carry different tokens,
    so at most one node per depth is accepted."""
    match = tokens == choice.gather(1, parents)                                       # [B, N]
    match[:, 0] = True
    accepted = (match[:, None] | ~mask).all(-1)                                       # [B, N]
    depth = mask.sum(-1) - 1                                                          # [B, N]
    slot = torch.where(accepted, depth, width)                                        # rejected nodes go to a spare slot
    index = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    path = index.new_zeros(len(tokens), width + 1).scatter(1, slot, index)[:, :width]  # [B, P]
    count = accepted.sum(-1) - 1                                                      # [B]
    last = path.gather(1, count[:, None])                                             # [B, 1]
    return path, count, choice.gather(1, last).squeeze(1)


def tree_reward(log_prob, parents, mask, aggregator="lse", eta=1.0):
    """How much of a drafted tree the target would accept (GTO, arXiv 2509.22134, eq. 3-5). Every node is real.

    log_prob [B, N]  log T(token of the node | its ancestors), 0 for the root, as returned by `score_nodes`
    parents  [B, N]; mask [B, N, N] bool, ancestors and self
    aggregator   "lse": (1/eta) log sum over leaves of exp(eta L); "max", "mean": of L over leaves;
                 "expected": sum of P over all nodes but the root, the expected accepted drafts of a sampling target
    Returns  P [B, N] float32, the probability of the node's path (eq. 4), 1 for the root;
             L [B, N] float32, sum of P over the node and its ancestors without the root (eq. 3);
             reward R [B] float32
    """
    run = tree_reward_triton if use_triton(log_prob) else tree_reward_reference
    return run(log_prob, parents, mask, aggregator, eta)


def tree_reward_reference(log_prob, parents, mask, aggregator="lse", eta=1.0):
    # `where`, not a product with the mask: log T may be -inf, and 0 * -inf is NaN.
    P = torch.where(mask, log_prob.float()[:, None], 0.0).sum(-1).exp()               # [B, N]
    L = torch.where(mask, P[:, None], 0.0).sum(-1) - 1                                # [B, N]
    if aggregator == "expected":
        return P, L, P[:, 1:].sum(-1)
    leaf = torch.ones_like(mask[:, 0]).scatter(1, parents[:, 1:], False)              # [B, N]
    if aggregator == "max":
        reward = L.masked_fill(~leaf, float("-inf")).amax(-1)
    elif aggregator == "mean":
        reward = L.masked_fill(~leaf, 0.0).sum(-1) / leaf.sum(-1)
    else:
        reward = (eta * L).masked_fill(~leaf, float("-inf")).logsumexp(-1) / eta
    return P, L, reward


def tree_reward_triton(log_prob, parents, mask, aggregator="lse", eta=1.0):
    raise NotImplementedError
