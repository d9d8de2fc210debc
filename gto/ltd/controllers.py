"""How others decide when to stop drafting, to compare with: a signal and a threshold, tuned on the machine."""
from functools import partial
from itertools import product

from torch.distributions import Categorical

from gto.ltd.replay import drive
from gto.policy import Fixed

# What the frontier's probabilities [.., top_k] say about another level: draft on while it is at least a threshold.
SIGNALS = {"best path's probability": lambda frontier: frontier[..., 0],
           "chance that one is accepted (SpecDec++)": lambda frontier: frontier.sum(-1),
           "entropy": lambda frontier: -Categorical(probs=frontier + 1e-9).entropy()}


class Threshold(Fixed):
    """Always drafts, on while a signal is at least `least`; always verifies the same size."""

    def __init__(self, signal, space, size, least):
        super().__init__(space, space.depth, size)
        self.signal, self.least = signal, least

    def stop(self, seen):
        return (seen[..., 0] > 0) & (self.signal(seen[..., 6:6 + self.space.top_k]) < self.least)


class RunningMean(Fixed):
    """Drafts `more` levels than were accepted lately (GammaTune)."""

    def __init__(self, space, size, more):
        super().__init__(space, space.depth, size)
        self.mean, self.more = 1.0, more

    def stop(self, seen):
        return seen[..., 0] * self.space.depth >= max(self.mean + self.more, 1)

    def learn(self, accepted):
        self.mean += 0.1 * (accepted - self.mean)


def tuned(recording, costs):
    """-> {name: (a function of nothing, which makes the controller with the numbers that replay fastest)}"""
    space = costs.space
    kinds = {name: (partial(Threshold, signal, space), (-2, -1.5, -1, -0.5) if name == "entropy" else
                    (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7)) for name, signal in SIGNALS.items()}
    kinds["running mean of acceptances (GammaTune)"] = partial(RunningMean, space), (-1, 0, 1, 2)
    sizes = range(len(space.sizes) // 2, len(space.sizes))
    return {name: max((partial(make, *numbers) for numbers in product(sizes, values)),
                      key=lambda make: drive(make(), recording, costs).rate) for name, (make, values) in kinds.items()}
