"""Exercise 1: a reward that discounts deep nodes.

GTO rewards a tree by its root-to-leaf paths (eq. 3-5): a beginning that many paths share counts many times. But if a
sampling target accepts A drafts of a tree, the chance that A >= d is the sum of P (eq. 4) over the nodes of depth d,
each counted once. So the mean of *any* utility u of A is a sum over nodes:

    E[u(A)] - u(0) = sum over all nodes but the root of (u(depth) - u(depth - 1)) * P

With u(A) = A this is the aggregator "expected". Write "discounted", u(A) = 1 + gamma + gamma^2 + .. (A terms): the
first accepted draft is worth 1, the second gamma, and so on, as every further level costs another head pass.

Change   `tree_reward` in gto/rollout.py: aggregator "discounted", its gamma is the argument `eta`
Size     about 5 lines, the docstring's included
Hint     `mask` knows the depth of every node
Run      python -m pytest -m exercise tests/exercises/test_1_reward.py
Then     name it in the check in gto/config.py, and: python train.py --aggregator discounted --eta 0.7"""
import pytest
import torch

from gto.rollout import tree_reward
from gto.tree import Tree
from gto.verify import accept
from tests.exercises.task import todo
from tests.test_kernels import random_trees

pytestmark = pytest.mark.exercise


def discounted(log_prob, tree, gamma):
    """The reward; nothing else that `tree_reward` returns may change."""
    P, L, reward = tree_reward(log_prob, tree.parents, tree.mask, "discounted", gamma)
    *paths, paper = tree_reward(log_prob, tree.parents, tree.mask, "lse", gamma)
    if torch.equal(reward, paper):                                 # what tree_reward takes an unknown name for
        todo("gto.rollout.tree_reward knows no aggregator 'discounted' yet")
    assert torch.equal(P, paths[0]) and torch.equal(L, paths[1])
    return reward


def random_trees_of(B, N, alphabet):
    torch.manual_seed(0)
    tokens, parents, mask = (x.cpu() for x in random_trees(B, N, alphabet))
    return Tree(tokens, parents, mask, mask.sum(-1) - 1, None)


@pytest.mark.parametrize("gamma", [1.0, 0.6, 0.25])
def test_it_is_the_mean_utility_of_what_verification_accepts(gamma):
    """All 3^7 draws of the target at the seven nodes of a tree, by the verifier that decoding uses."""
    (B, N), draws = (12, 7), torch.cartesian_prod(*[torch.arange(3)] * 7)              # [3^7, N]
    tree, p = random_trees_of(B, N, 3), torch.rand(B, N, 3, dtype=torch.float64)
    p[..., 2] *= torch.rand(B, N) < 0.5                            # tokens that the target rules out
    p /= p.sum(-1, keepdim=True)                                   # [B, N, V] its distribution after each node
    log_prob = p[torch.arange(B)[:, None], tree.parents, tree.tokens].log()            # [B, N]
    log_prob[:, 0] = 0
    assert log_prob.isinf().any(), "the trees show less than they should"
    utility = torch.tensor([sum(gamma ** d for d in range(accepted)) for accepted in range(N)], dtype=torch.float64)
    want = []
    for b in range(B):
        one = Tree(*(None if x is None else x[b:b + 1].expand(len(draws), *x.shape[1:]) for x in tree))
        _, accepted, _ = accept(one, draws, N)
        chance = p[b, torch.arange(N), draws].prod(-1)                                 # [3^7]
        want.append((chance * utility[accepted]).sum())
    reward = discounted(log_prob, tree, gamma)
    assert reward.shape == (B,) and reward.dtype == torch.float32
    torch.testing.assert_close(reward, torch.stack(want).float(), atol=1e-5, rtol=1e-5)


def test_at_its_ends_it_is_something_simpler():
    tree, log_prob = random_trees_of(4, 30, 4), -2 * torch.rand(4, 30)
    log_prob[:, 0] = 0
    expected = tree_reward(log_prob, tree.parents, tree.mask, "expected")[2]
    torch.testing.assert_close(discounted(log_prob, tree, 1.0), expected)
    first_level = (log_prob.exp() * (tree.depth == 1)).sum(-1)
    torch.testing.assert_close(discounted(log_prob, tree, 1e-6), first_level, atol=1e-4, rtol=0)
    only_roots = log_prob[:, :1], tree.parents[:, :1], tree.mask[:, :1, :1]
    assert tree_reward(*only_roots, "discounted", 0.5)[2].tolist() == [0.0] * 4
