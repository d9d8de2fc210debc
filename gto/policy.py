"""Deciding per cycle when to stop drafting and how many nodes to verify (Learning to Draft, arXiv 2603.01639).

Every policy sees the same vector, `observe`, in training and in decoding, and answers two questions about it:
stop drafting here? and, once stopped, which of the sizes to verify? None of this touches the output: whatever tree
is verified, the tokens are the target's.
"""
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from gto.checkpoint import read, save
from gto.errors import UserError
from gto.tree import TreeShape


@dataclass(frozen=True)
class Space:
    """What there is to choose from: a tree of k = `branch` children, 1 to `levels` levels, and one of `sizes` nodes."""
    branch: int
    levels: int
    sizes: tuple     # drafted nodes to verify, ascending; 0: only the root. Each is a fixed shape, fit for a graph

    @property
    def shape(self):
        """The largest tree: the engine's state is made for it."""
        return TreeShape(self.branch, self.levels, self.sizes[-1])

    @property
    def width(self):
        """Numbers in an observation."""
        return 2 + self.branch + self.sizes[-1]

    def nodes(self, level, size):
        """Nodes kept of a draft of `level` levels when size number `size` is chosen: never more than were drafted."""
        return min(self.sizes[size], self.branch + (level - 1) * self.branch ** 2)

    def choices(self, level):
        """The same for every size: [sizes]."""
        return [self.nodes(level, size) for size in range(len(self.sizes))]


def observe(scores, length, space):
    """What a policy sees of a draft. The same function builds the training data and is called while decoding.

    scores: by drafted level [B, n], sums of log-probabilities; length [B] tokens the target has cached
    Returns [B, width]: levels drafted / levels; context in thousands of tokens; probabilities of the newest level's k
    best nodes (the frontier), descending; of the best nodes of all levels, descending, 0 where there are none.
    """
    k, most = space.branch, space.sizes[-1]
    seen = scores[0].new_zeros(len(length), space.width)
    seen[:, 0] = len(scores) / space.levels
    seen[:, 1] = length / 1000
    every = torch.cat(scores, dim=1)                                                  # [B, C]
    best = every.topk(min(most, every.shape[1]), dim=1).values
    torch.exp(scores[-1].topk(k, dim=1).values, out=seen[:, 2:2 + k])
    torch.exp(best, out=seen[:, 2 + k:2 + k + best.shape[1]])
    return seen


class Fixed:
    """The same depth and size in every cycle."""

    def __init__(self, space, level, size):
        self.space, self.level, self.choice = space, level, size

    def stop(self, seen):
        return (seen[:, 0] * self.space.levels).round() >= self.level                 # [B] bool

    def size(self, seen):
        return torch.full((len(seen),), self.choice, device=seen.device)              # [B], index of a size


class Costs(NamedTuple):
    """What a cycle takes on this machine, in seconds, by context: bucket b holds lengths from b * STEP on."""
    draft: torch.Tensor     # [contexts, levels]  extending the head and drafting so many levels
    verify: torch.Tensor    # [contexts, levels, sizes]  re-ranking, the target's forward, committing

    STEP = 64

    def bucket(self, length):
        return (length // self.STEP).clamp(max=len(self.draft) - 1)


class Rule:
    """Stop when the expected gain in accepted tokens is below its cost. Needs no training (compare OPT-Tree,
    arXiv 2406.17276, which stops at a fixed gain).

    A path's draft probability estimates the chance that it is accepted. Time is worth `rate` tokens a second, the
    speed of decoding itself: a decision is good if what it gains is more than what its time would yield elsewhere.
    """

    def __init__(self, space, costs, rate):
        self.space, self.rate = space, rate
        # In tokens: another level with one more node to verify; every size of a draft.
        levels, sizes = costs.draft * rate, costs.verify * rate
        node = (sizes[:, -1, -1] - sizes[:, -1, 0]) / max(space.sizes[-1] - space.sizes[0], 1)  # [contexts]
        self.level_cost = levels.diff(dim=1) + node[:, None]                          # [contexts, levels - 1]
        self.size_cost, self.bucket = sizes, costs.bucket

    def where(self, seen):
        return (self.bucket((seen[:, 1] * 1000).round().long()),
                (seen[:, 0] * self.space.levels).round().long())                      # context bucket, level: [B]

    def stop(self, seen):
        bucket, level = self.where(seen)
        # The newest level's best path, of probability p, lost a factor of p^(1/level) a level on its way.
        gain = seen[:, 2] ** ((level + 1) / level)                                    # [B] of its likeliest child
        return gain < self.level_cost[bucket, level - 1]

    def size(self, seen):
        bucket, level = self.where(seen)
        gain = F.pad(seen[:, 2 + self.space.branch:].cumsum(1), (1, 0))[:, self.space.sizes]  # [B, sizes]
        return (gain - self.size_cost[bucket, level - 1]).argmax(1)


def mlp(*widths):
    layers = [layer for a, b in zip(widths, widths[1:]) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class Learned(nn.Module):
    """The two actors. hidden: the width of the hidden layer; the size policy has a second one, a quarter as wide."""

    def __init__(self, space, hidden):
        super().__init__()
        self.space, self.hidden = space, hidden
        self.depth_actor = mlp(space.width, hidden, 2)                                # go on, stop
        self.size_actor = mlp(space.width, hidden, hidden // 4, len(space.sizes))

    def stop(self, seen):
        return self.depth_actor(seen).argmax(1) == 1

    def size(self, seen):
        return self.size_actor(seen).argmax(1)


def save_policy(path, learned, costs, rate, chosen):
    """One file holds the learned policy and what the rule needs; `chosen` ("ltd" or "rule") was the faster one."""
    save(path, kind="policy", space=asdict(learned.space), hidden=learned.hidden, model=learned.state_dict(),
         costs=list(costs), rate=rate, chosen=chosen)


def beside(head_path):
    """Where train.py --stage ltd leaves the policy for a head: policy-<head's file>, in the same folder."""
    return Path(head_path).with_name(f"policy-{Path(head_path).name}")


def load_policy(path, shape=None):
    """The faster of the learned policy and the rule, to be asked on the CPU. UserError if it was made for another
    tree than `shape`."""
    contents = read(path, "policy")
    space = Space(**{**contents["space"], "sizes": tuple(contents["space"]["sizes"])})
    if shape not in (None, space.shape):
        raise UserError(f"{path} was learned for trees {space.shape}, not {shape}: leave the tree out, or learn again"
                        " with python train.py --stage ltd")
    if contents["chosen"] == "rule":
        return Rule(space, Costs(*contents["costs"]), contents["rate"])
    learned = Learned(space, contents["hidden"])
    try:
        learned.load_state_dict(contents["model"])
    except RuntimeError:
        raise UserError(f"{path}: the weights do not fit the tree {space.shape} and sizes {space.sizes} it names: learn"
                        " again with python train.py --stage ltd")
    return learned.eval().requires_grad_(False)
