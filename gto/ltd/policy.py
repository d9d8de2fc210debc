"""The learned policy: two small networks answer what gto/policy.py asks. Both see the same vector, `observe`."""
from dataclasses import asdict

import torch
from torch import nn

from gto.checkpoint import read, save
from gto.policy import Fixed, Space
from gto.util import reading


def mlp(*widths):
    layers = [layer for a, b in zip(widths, widths[1:]) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class Learned(nn.Module):
    """The two actors. hidden: the width of the hidden layer; the size policy has a second one, a quarter as wide."""
    waits, learn = Fixed.waits, Fixed.learn

    def __init__(self, space, hidden):
        super().__init__()
        self.space, self.hidden, self.width = space, hidden, 2 + space.top_k + space.sizes[-1]
        self.depth_actor = mlp(self.width, hidden, 2)                                 # go on, stop
        self.size_actor = mlp(self.width, hidden, hidden // 4, len(space.sizes))

    def stop(self, observation):
        return self.depth_actor(observation).argmax(-1) == 1

    def size(self, observation):
        return self.size_actor(observation).argmax(-1)


def save_policy(path, policy, gain):
    """gain: how much faster than the rule a Learned policy has proved to be, as a share."""
    save(path, kind="policy", space=asdict(policy.space), hidden=policy.hidden, gain=float(gain), model=policy.state_dict())


def load_policy(path):
    """-> a Learned policy, on the CPU, where it is asked; its gain over the rule."""
    contents = read(path, "policy")
    with reading(path):
        policy = Learned(Space(**contents["space"]), contents["hidden"])
        policy.load_state_dict(contents["model"])
        return policy.requires_grad_(False), float(contents["gain"])
