"""How others decide when to stop drafting, to compare with: by a number and a threshold. They verify a fixed size."""
from functools import partial
from itertools import product

import torch
from torch.distributions import Categorical

from gto.ltd.replay import drive
from gto.policy import FIRST, Fixed


class Threshold(Fixed):
    """Drafts on while a signal of the frontier's probabilities, `top_k` of them, is at least `least`."""
    signals = {"best path's probability": lambda frontier: frontier[0],
               "chance that one is accepted (SpecDec++)": sum,
               "entropy": lambda frontier: 0.5 - Categorical(torch.tensor(frontier) + 1e-9).entropy() / 4}

    def __init__(self, name, space, size, least):
        super().__init__(space, space.depth, size)
        self.signal, self.least = self.signals[name], least

    def stop(self, seen):
        return seen[0] > 0 and self.signal(seen[FIRST:FIRST + self.space.top_k]) < self.least


class RunningMean(Threshold):
    """Drafts a few levels more than were accepted lately (GammaTune)."""
    signals, mean = {"running mean of acceptances (GammaTune)": None}, 1.0

    def stop(self, seen):
        return seen[0] * self.space.depth >= max(self.mean + 4 * self.least, 1)

    def learn(self, accepted):
        self.mean += 0.1 * (accepted - self.mean)


def tuned(recording, costs):
    """-> {name: a function of nothing that makes the controller with the size and threshold that replay fastest}"""
    numbers = list(product(range(2, len(costs.space.sizes), 2), (0.02, 0.05, 0.1, 0.2, 0.3, 0.5)))
    return {name: max((partial(kind, name, costs.space, *each) for each in numbers),
                      key=lambda made: drive(made(), recording, costs).rate)
            for kind in (Threshold, RunningMean) for name in kind.signals}
