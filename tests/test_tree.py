"""The draft tree against a plain, recursive reading of the decoding policy."""
import pytest
import torch

from gto.engine import Engine
from gto.tree import TreeShape, ancestor_mask, rerank
from tests.tiny import tiny_models, tiny_prompts

SHAPES = [TreeShape(1, 4, 4), TreeShape(3, 1, 2), TreeShape(2, 4, 9), TreeShape(4, 3, 20), TreeShape(4, 3, 36)]


def brute_force(head, features, tokens, shape, temperature):
    """GTO.md's policy G with lists and dicts. Paths are scored by `head.unroll`, which shares no attention code with
    drafting. features [T, 3 * dim] and tokens [T] end with the root. Returns {path: score} of the kept nodes."""
    def log_probs(path):                                           # of the token after this drafted path
        chains = torch.tensor([[list(path)]], dtype=torch.long).view(1, 1, -1)
        hidden = head.unroll(features[None], tokens[None], torch.tensor([[len(tokens) - 2]]), chains)
        return torch.log_softmax(head.logits(hidden[0, 0, -1]) / temperature, -1)

    frontier, candidates = {(): 0.0}, {}
    for _ in range(shape.depth):
        children = {}
        for path, score in frontier.items():
            top = log_probs(path).topk(shape.top_k)
            for value, index in zip(top.values.tolist(), top.indices.tolist()):
                children[path + (head.token_ids[index].item(),)] = score + value
        candidates |= children
        frontier = dict(sorted(children.items(), key=lambda item: -item[1])[:shape.top_k])
    return dict(sorted(candidates.items(), key=lambda item: -item[1])[:shape.nodes])


def paths_of(tree, b):
    """{path: score} of tree b without the root."""
    paths = {}
    for i in range(1, tree.tokens.shape[1]):
        ancestors = tree.mask[b, i].nonzero().flatten()[1:]        # node order is root-first; 0 is the root
        paths[tuple(tree.tokens[b, ancestors].tolist())] = tree.scores[b, i].item()
    return paths


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("draft_vocab, temperature", [(29, 1.0), (11, 0.4)])
@torch.no_grad()
def test_tree_equals_brute_force(shape, draft_vocab, temperature):
    target, head = tiny_models(draft_vocab=draft_vocab)
    prompts = tiny_prompts(3)
    engine = Engine(target, head, shape, batch=3, score_temp=temperature)
    roots = engine.prefill(prompts)
    tree = engine.draft()                                          # three prefixes of different lengths at once
    for b, prompt in enumerate(prompts):
        tokens = torch.tensor(prompt + roots[b:b + 1])
        _, features, _, _ = target(tokens[None])
        expected = brute_force(head, features[0], tokens, shape, temperature)
        found = paths_of(tree, b)
        assert found.keys() == expected.keys()
        assert all(abs(found[path] - expected[path]) < 1e-3 for path in found)
        assert len(found) == shape.nodes


@torch.no_grad()
def test_tree_is_consistent():
    target, head = tiny_models()
    engine = Engine(target, head, TreeShape(4, 4, 30), batch=4)
    engine.prefill(tiny_prompts(4))
    tree = engine.draft()
    index = torch.arange(31)
    assert (tree.parents[:, 1:] < index[1:]).all() and (tree.parents[:, 0] == 0).all()
    assert (tree.depth[:, 1:] == tree.depth.gather(1, tree.parents)[:, 1:] + 1).all()
    assert (tree.scores[:, 1:] <= tree.scores.gather(1, tree.parents)[:, 1:]).all()


def test_ancestor_mask_equals_a_walk():
    torch.manual_seed(0)
    for most in (1, 2, 3, 7, 12):
        n = 2 * most + 3
        parents, depth = torch.zeros(1, n, dtype=torch.long), [0]
        for i in range(1, n):
            allowed = [j for j in range(i) if depth[j] < most]
            parents[0, i] = allowed[-1] if i <= most else allowed[int(torch.randint(len(allowed), ()))]
            depth.append(depth[parents[0, i]] + 1)
        mask = ancestor_mask(parents, most)[0]
        for i in range(n):
            walk, j = {i}, i
            while j:
                j = int(parents[0, j])
                walk.add(j)
            assert set(mask[i].nonzero().flatten().tolist()) == walk


def test_ties_never_orphan_a_node():
    """All scores equal, as when a draft is certain of everything: the kept nodes must still be a tree."""
    shape = TreeShape(2, 4, 7)
    root = torch.zeros(1, dtype=torch.long)
    tokens = torch.arange(1, 15)[None]
    parents = torch.tensor([[0, 0, 1, 1, 2, 2, 3, 3, 5, 5, 7, 7, 9, 9]])   # candidate index + 1
    tree = rerank(root, tokens, parents, torch.zeros(1, 14), shape)
    assert tree.tokens[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert tree.parents[0].tolist() == [0, 0, 0, 1, 1, 2, 2, 3]
