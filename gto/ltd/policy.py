"""Policies: when to stop drafting, and how many nodes to verify. All see the same vector, `observe`, and answer two
questions: stop(observation [.., width]) -> [..] bool, then size(observation) -> [..], an index into `space.sizes`."""
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from gto.checkpoint import read, save
from gto.tree import TreeShape
from gto.util import UserError, reading


@dataclass(frozen=True)
class Space:
    """What there is to choose from: drafts of 1 to `depth` levels, `top_k` children a node, cut to one of `sizes`."""
    top_k: int
    depth: int
    sizes: tuple     # drafted nodes to verify, ascending; 0: only the root. Each is a fixed shape, fit for a CUDA graph

    @property
    def shape(self):
        """The largest tree: the engine's state is made for it."""
        return TreeShape(self.top_k, self.depth, self.sizes[-1])

    def nodes(self, depth, size):
        """Nodes kept of a draft of `depth` levels when size number `size` is chosen: never more than were drafted."""
        return min(self.sizes[size], self.top_k + (depth - 1) * self.top_k ** 2)


def observe(scores, length, space):
    """What a policy sees. scores: by level [B, n], sums of log-probabilities; length [B]: tokens in the target's cache.
    Returns [B, width]: levels drafted / depth; context in thousands of tokens; probabilities of the newest level's
    top_k best nodes (the frontier), descending; of the best nodes of all levels, descending, 0 where there are none."""
    frontier = scores[-1].topk(space.top_k, dim=1).values                             # [B, top_k]
    best = F.pad(torch.cat(scores, dim=1), (0, space.sizes[-1]), value=float("-inf"))
    best = best.topk(space.sizes[-1], dim=1).values                                   # [B, largest size]
    drafted = torch.full_like(best[:, :1], len(scores) / space.depth)
    return torch.cat([drafted, length[:, None] / 1000, frontier.exp(), best.exp()], dim=1)


class Fixed:
    """The same depth and size in every cycle."""

    def __init__(self, space, depth, size):
        self.space, self.depth, self.choice = space, depth, size
        self.shape = TreeShape(space.top_k, depth, max(space.nodes(depth, size), 1))

    def stop(self, observation):
        return (observation[..., 0] * self.space.depth).round() >= self.depth

    def size(self, observation):
        return torch.full(observation.shape[:-1], self.choice)


class Rule(nn.Module):
    """Stop when the expected gain in accepted tokens is below its cost: what its time would yield at `rate` tokens a
    second, the speed of decoding itself. costs [depth, sizes]: see `gto.ltd.replay.measure`. Needs no training."""

    def __init__(self, space, costs, rate):
        super().__init__()
        self.space, self.arguments = space, (costs, rate)
        # In tokens: each size; another level with one more node to verify, and after the last level there is none.
        self.size_cost, level_cost = costs[-1] * rate, costs[:, -1].diff() * rate     # [sizes], [depth - 1]
        node_cost = (self.size_cost[-1] - self.size_cost[0]) / (space.sizes[-1] - space.sizes[0])
        self.level_cost = F.pad(level_cost + node_cost, (0, 1), value=float("inf"))   # [depth]

    def stop(self, observation):
        drafted = (observation[..., 0] * self.space.depth).round().long()
        # The newest level's best path, of probability p, lost a factor of p^(1/level) a level on its way.
        gain = observation[..., 2] ** ((drafted + 1) / drafted)                       # of its likeliest child
        return gain < self.level_cost[drafted - 1]

    def size(self, observation):
        best = observation[..., 2 + self.space.top_k:]                                # [.., largest size]
        gain = F.pad(best.cumsum(-1), (1, 0))[..., list(self.space.sizes)]            # [.., sizes]
        return (gain - self.size_cost).argmax(-1)


def mlp(*widths):
    layers = [layer for a, b in zip(widths, widths[1:]) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class Learned(nn.Module):
    """The two actors. hidden: the width of the hidden layer; the size policy has a second one, a quarter as wide."""

    def __init__(self, space, hidden):
        super().__init__()
        self.space, self.arguments, self.width = space, (hidden,), 2 + space.top_k + space.sizes[-1]
        self.depth_actor = mlp(self.width, hidden, 2)                                 # go on, stop
        self.size_actor = mlp(self.width, hidden, hidden // 4, len(space.sizes))

    def stop(self, observation):
        return self.depth_actor(observation).argmax(-1) == 1

    def size(self, observation):
        return self.size_actor(observation).argmax(-1)


def policy_path(head_path):
    """Where python -m gto.ltd leaves the policy for a head: policy-<head's file>, in the same folder."""
    return Path(head_path).with_name(f"policy-{Path(head_path).name}")


def save_policy(path, policy):
    """A Rule or a Learned policy."""
    save(path, kind="policy", name=type(policy).__name__, space=asdict(policy.space), arguments=policy.arguments,
         model=policy.state_dict())


def load_policy(path, shape=None):
    """On the CPU, where it is asked. UserError if the file holds no policy, or one for another tree than `shape`."""
    contents = read(path, "policy")
    with reading(path):
        space = Space(**contents["space"])
        policy = {"Rule": Rule, "Learned": Learned}[contents["name"]](space, *contents["arguments"])
        policy.load_state_dict(contents["model"])
    if shape not in (None, space.shape):
        raise UserError(f"{path} was learned for trees {space.shape}, not {shape}: leave the tree out, or learn again")
    return policy.requires_grad_(False)
