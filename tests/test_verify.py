"""Sampling is lossless: exact enumeration on a small tree, Monte-Carlo through the whole engine, warps by hand."""
import itertools
import math
from collections import Counter

import pytest
import torch

from gto.engine import Engine
from gto.tree import Tree, TreeShape
from gto.verify import Sampling, accept, warp
from tests.test_kernels import random_trees
from tests.tiny import tiny_models


def walk(tokens, parents, choice, width):
    """Verification as it is usually written: from the root, step by step, one tree at a time."""
    node, path = 0, [0]
    while True:
        children = [j for j in range(1, len(tokens)) if parents[j] == node and tokens[j] == choice[node]]
        if not children:
            return path + [0] * (width - len(path)), len(path) - 1, choice[node]
        node = children[0]
        path.append(node)


def tree_of(tokens, parents, mask):
    return Tree(tokens, parents, mask, mask.sum(-1) - 1, None)


@pytest.mark.parametrize("trees, N", [(2000, 12), (3, 60), (1, 130), (2, 1)])
def test_accept_equals_the_walk(trees, N):
    tokens, parents, mask = (x.cpu() for x in random_trees(trees, N, alphabet=3))
    choice = torch.randint(3, (trees, N))
    got = accept(tree_of(tokens, parents, mask), choice, N)
    want = [walk(*row, N) for row in zip(tokens.tolist(), parents.tolist(), choice.tolist())]
    assert [x.tolist() for x in got] == [list(x) for x in zip(*want)]
    assert N == 1 or (got[1] > 0).any() and (got[1] < N - 1).any()


def test_accept_nothing_and_everything():
    N = 7
    tokens = torch.arange(N).repeat(2, 1)
    parents = (tokens - 1).clamp(min=0)                                # a chain
    mask = torch.ones(2, N, N, dtype=torch.bool).tril()
    choice = torch.stack([tokens[0] + 1, tokens[0] + 2])               # the next token, never the next token
    path, count, next_token = accept(tree_of(tokens, parents, mask), choice, N)
    assert path.tolist() == [list(range(N)), [0] * N]
    assert count.tolist() == [N - 1, 0] and next_token.tolist() == [N, 2]


def test_exact_distribution_by_enumeration():
    """Root with children 0 and 2, node 0 with child 1, over 3 tokens. All 3^4 draws of the four nodes, weighed by the
    target's probabilities, must give every continuation the probability that the target gives it."""
    torch.manual_seed(0)
    tokens, parents = torch.tensor([[9, 0, 2, 1]]), torch.tensor([[0, 0, 0, 1]])
    mask = torch.tensor([[[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]]]).bool()
    p = torch.rand(4, 3, dtype=torch.float64).softmax(-1)          # the target's distribution after each node
    found = Counter()
    for draws in itertools.product(range(3), repeat=4):
        path, count, bonus = accept(tree_of(tokens, parents, mask), torch.tensor([draws]), 3)
        emitted = tuple(tokens[0, path[0, 1:count[0] + 1]].tolist()) + (bonus.item(),)
        found[emitted] += math.prod(p[node, draw].item() for node, draw in enumerate(draws))
    node_of = {(): 0, (0,): 1, (2,): 2, (0, 1): 3}                 # where the tree has looked ahead
    expected = Counter()
    for n in (1, 2, 3):
        for text in itertools.product(range(3), repeat=n):
            # a text is emitted in one cycle if all but its last token lie in the tree, and the whole does not
            if text[:-1] in node_of and text not in node_of:
                expected[text] = math.prod(p[node_of[text[:i]], text[i]].item() for i in range(n))
    assert found.keys() == expected.keys()
    assert all(abs(found[text] - expected[text]) < 1e-12 for text in expected)


VOCAB, PROMPT = 8, [1, 2, 3]


@torch.no_grad()
def three_tokens(target, sampling):
    """{three tokens: the probability that the target gives them behind PROMPT}, of those that are possible."""
    exact = {}
    for text in itertools.product(range(VOCAB), repeat=2):
        hidden, *_ = target(torch.tensor([PROMPT + list(text)]))
        p = warp(target.logits(hidden[0, -3:]), sampling).double().softmax(-1)
        for last in range(VOCAB):
            exact[(*text, last)] = (p[0, text[0]] * p[1, text[1]] * p[2, last]).item()
    return {text: p for text, p in exact.items() if p > 0}


def draw_three(target, head, sampling, rounds, batch):
    """How often rounds * batch runs of the engine drew which three tokens."""
    torch.manual_seed(0)
    engine, found = Engine(target, head, TreeShape(3, 2, 6), sampling, batch, capacity=16), Counter()
    for _ in range(rounds):
        found.update(tuple(row[len(PROMPT):]) for row in engine.complete([PROMPT] * batch, 3))
    return found


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.7, top_k=4), Sampling(1.3, top_p=0.8)], ids=str)
def test_engine_samples_the_targets_distribution(sampling):
    """First three tokens of 6,000 runs against exact probabilities. In n draws the expected total variation of a
    perfect sampler is at most the sum of sqrt(p (1 - p) / n) / 2 over the outcomes (Jensen; here up to 0.07); McDiarmid
    bounds an excess of 0.035 by exp(-2 n 0.035^2) = 4e-7. A temperature 20 % off fails."""
    models, runs = tiny_models(seed=6, vocab=VOCAB), 6000
    exact, found = three_tokens(models[0], sampling), draw_three(*models, sampling, 3, runs // 3)
    perfect = sum(math.sqrt(p * (1 - p) / runs) for p in exact.values()) / 2
    assert found.keys() <= exact.keys()
    assert sum(abs(found[text] / runs - p) for text, p in exact.items()) / 2 < perfect + 0.035


def test_warp_by_hand():
    logits = torch.tensor([0.0, 3.0, 1.0, 2.0])
    kept = lambda s: torch.isfinite(warp(logits, s)).tolist()
    torch.testing.assert_close(warp(logits, Sampling(2.0)), logits / 2)
    assert kept(Sampling(1.0, top_k=2)) == [False, True, False, True]
    p = logits.softmax(-1)                                         # .03, .64, .09, .24
    assert kept(Sampling(1.0, top_p=p[1].item() - 1e-3)) == [False, True, False, False]
    assert kept(Sampling(1.0, top_p=p[1].item() + 1e-3)) == [False, True, False, True]
    assert kept(Sampling(1.0, top_p=0.96)) == [False, True, True, True]
