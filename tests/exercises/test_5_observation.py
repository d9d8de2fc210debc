"""Exercise 5: something else for a depth policy to see.

LTD's policies see the newest level's frontier and the best nodes of all levels. What they would have to compute from
the cycle before is what the newest level has *brought*: whether it was worth its head pass. With n = space.sizes[-1]

    E_l = sum of the n largest path probabilities among the nodes of levels 1..l,  E_0 = 0,   gain = E_l - E_(l-1)

is what the newest level l adds to the expected number of accepted drafts: OPT-Tree's reason to stop (exercise 2).

Why not the mean of the last accepted lengths? A policy learns from a recording of drafts at *every* position of a text
(gto/ltd/replay.py). There is no last cycle there: what is observed must follow from the draft and the text alone.

Change   `observe` in gto/policy.py: the gain as one more column, the last. (The width that `Learned` expects stands in
         gto/ltd/ppo.py. Why does `Rule` not mind a column more, if it is the last?)
Size     10 to 12 lines
Hint     one helper for "the best n of these levels" serves three times; at level 1 there are no levels before
Run      python -m pytest -m exercise tests/exercises/test_5_observation.py, then tests/test_ltd.py
Then     python -m gto.ltd: does LTD come closer to its oracle? (The paper found that entropy does not help.)"""
import numpy as np
import pytest
import torch

from gto.ltd.ppo import Learned
from gto.policy import Costs, Rule, Space, observe
from gto.tree import Draft
from tests.exercises.task import todo

pytestmark = pytest.mark.exercise
SPACE = Space(3, 4, (0, 1, 2, 5, 7))
WIDTH = 6 + SPACE.top_k + SPACE.sizes[-1]                          # today's


def random_scores(B, levels, k, seed):
    """By level [B, n]: what some draft may have, from hesitating to certain."""
    generator = torch.Generator().manual_seed(seed)
    scores, frontier = [], torch.zeros(B, 1)
    for _ in range(levels):
        steps = torch.rand(B, frontier.shape[1], k, generator=generator) ** (1 + 3 * torch.arange(B))[:, None, None]
        scores.append((frontier[..., None] - 3 * steps).flatten(1))
        frontier = scores[-1].topk(k, dim=1).values
    return tuple(scores)


def observed(scores, known, space):
    tokens = tuple(torch.zeros_like(x, dtype=torch.long) for x in scores)
    seen = torch.tensor(observe(known.tolist(), Draft(scores, tokens, None, None, None, None), space))
    if seen.shape[1] == 6 + space.top_k + space.sizes[-1]:
        todo("gto.policy.observe has no column for the gain yet")
    return seen


def best(levels, b, n):
    return sorted((score.exp().item() for level in levels for score in level[b]), reverse=True)[:n]


@pytest.mark.parametrize("sizes", [SPACE.sizes, (0, 2), (1, 30)], ids=str)
def test_the_gain_of_the_newest_level(sizes):
    space, n, known = Space(3, 4, sizes), sizes[-1], np.arange(25).reshape(5, 5) / 10
    for levels in range(1, 5):
        scores = random_scores(5, levels, 3, seed=levels)
        seen = observed(scores, known, space)
        assert seen.shape == (5, 6 + 3 + n + 1)
        for b in range(5):
            nodes = best(scores, b, n)
            want = [levels / 4, *known[b, :4], 0, *best(scores[-1:], b, 3), *nodes, *[0.0] * (n - len(nodes)),
                    sum(nodes) - sum(best(scores[:-1], b, n))]
            assert seen[b].tolist() == pytest.approx(want, abs=1e-5)
            alone = observed(tuple(x[b:b + 1] for x in scores), known[b:b + 1], space)
            assert torch.equal(seen[b:b + 1], alone)


def test_both_policies_take_it():
    costs = Costs(SPACE, 0.2 * np.arange(5), 1 + 0.05 * np.array(SPACE.sizes), np.zeros(5))
    rule, learned = Rule(costs), Learned(SPACE, 8)
    for levels in range(1, 5):
        seen = observed(random_scores(6, levels, 3, seed=0), np.full((6, 5), 0.5), SPACE)
        for row in seen.tolist():
            assert levels == 4 or rule.stop(row) == rule.stop(row[:WIDTH])
            assert rule.size(row) == rule.size(row[:WIDTH]), "the gain is taken for a node"
        assert learned.width == seen.shape[1], "Learned expects another width"
        assert learned.stop(seen).shape == learned.size(seen).shape == (6,)
