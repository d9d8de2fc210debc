"""Exercise 2: OPT-Tree, a draft that stops growing by itself (Wang et al., arXiv 2406.17276).

`draft_tree` always makes shape.depth - 1 head passes. OPT-Tree asks after every level what it has brought. If the
draft's path probabilities p are right, the expected number of accepted drafts is their sum over a tree's nodes. So the
best tree of n nodes has the n likeliest of all candidates (why are they a tree?):

    E_l = sum of the n largest p = exp(score) among the candidates of levels 1..l,  E_0 = 0

Stop after the first level l with E_l - E_(l-1) < threshold, or at shape.depth; that level is drafted and stays. In a
batch, whose trees share their head passes, stop when this is so in every tree. Keep the n = shape.nodes best of all
candidates, or all of them where there are fewer. A head pass that takes a tenth of a target step's time should bring
more than a tenth of a token: thresholds begin there. (The paper expands n nodes of a level, we top_k.)

Add      `opt_tree(head, hidden, root, prefix, shape, temperature, threshold)` in gto/tree.py, arguments as those of
         `draft_tree`. -> Tree
Size     about 15 lines, with its docstring
Hint     `draft_candidates` and `rerank`; `AdaptiveEngine` grows a draft level by level, too
Run      python -m pytest -m exercise tests/exercises/test_2_opt_tree.py
Then     draft with it in `Engine.draft`, on a CPU, and look for a fixed shape that is faster"""
import itertools
import math

import pytest
import torch

import gto.tree
from gto.engine import Engine
from gto.model import Prefix
from gto.tree import TreeShape
from tests.exercises.task import asked_for
from tests.test_tree import brute_force, paths_of
from tests.tiny import tiny_models, tiny_prompts

pytestmark = pytest.mark.exercise
THRESHOLDS = 0.0, 0.03, 0.1, 0.3, 0.7, 3.0


def drafts(prompts, shape, thresholds=THRESHOLDS):
    """-> for each threshold: the trees, the head passes they took; for each prompt all candidates {path: score}."""
    target, head = tiny_models(seed=1, spread=0.3)
    opt_tree = asked_for(gto.tree, "opt_tree")
    engine, passes = Engine(target, head, shape, batch=len(prompts), score_temp=1.0), []
    roots, found = engine.prefill(prompts), []
    root, draft = engine.begin()
    hidden, prefix = draft.hidden[:, 0], Prefix(engine.head_cache, engine.length)
    head.register_forward_hook(lambda *_: passes.append(None))
    for threshold in thresholds:
        passes.clear()
        found.append((opt_tree(head, hidden, root, prefix, shape, 1.0, threshold), len(passes)))
    everything = TreeShape(shape.top_k, shape.depth, shape.num_candidates)
    texts = [torch.tensor(prompt + [first]) for prompt, first in zip(prompts, roots)]
    return found, [brute_force(head, target(text[None])[1][0], text, everything, 1.0) for text in texts]


def expected_accepted(candidates, depth, nodes):
    """E_l of levels 1..depth, and the scores of the nodes that it is made of."""
    best = sorted((score for path, score in candidates.items() if len(path) <= depth), reverse=True)[:nodes]
    return sum(map(math.exp, best)), best


@pytest.mark.parametrize("shape", [TreeShape(3, 5, 9), TreeShape(2, 6, 14), TreeShape(4, 4, 3)], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_the_tree_grows_as_long_as_it_gains(shape, batch):
    depths, prompts = set(), tiny_prompts(6)
    for some in (prompts[i:i + batch] for i in range(0, len(prompts), batch)):
        found, candidates = drafts(some, shape)
        E = [[expected_accepted(c, depth, shape.nodes)[0] for depth in range(shape.depth + 1)] for c in candidates]
        for threshold, (tree, passes) in zip(THRESHOLDS, found):
            enough = [all(e[l] - e[l - 1] < threshold for e in E) for l in range(1, shape.depth)]
            depth = 1 + [*enough, True].index(True)
            assert passes == depth - 1, "one head pass for each level behind the first, and none for what is not used"
            for b, c in enumerate(candidates):
                _, best = expected_accepted(c, depth, shape.nodes)
                paths = paths_of(tree, b)
                assert all(path[:-1] in paths for path in paths if path[1:]), "not a tree"
                assert sorted(paths.values(), reverse=True) == pytest.approx(best, abs=1e-3)
                assert all(abs(score - c[path]) < 1e-3 for path, score in paths.items())
            depths.add(depth)
    assert {1, shape.depth} < depths, "the thresholds show nothing"


@torch.no_grad()
def test_no_other_tree_of_the_candidates_promises_more():
    shape = TreeShape(2, 4, 5)
    found, (candidates,) = drafts(tiny_prompts(1), shape, [0.0])
    trees = (nodes for nodes in itertools.combinations(candidates, shape.nodes)
             if all(path[:-1] in ((), *nodes) for path in nodes))
    promised = [sum(math.exp(candidates[path]) for path in nodes) for nodes in trees]
    assert len(promised) > 20
    assert found[0][0].scores[0, 1:].exp().sum().item() == pytest.approx(max(promised), abs=1e-3)
