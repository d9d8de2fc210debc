"""Our numbers against the peers': transformers (targets) and EAGLE's own code (heads, trees, decoding, acceptance).

The tests named *_fixture read tests/fixtures/goldens.pt and always run. The others need the peers' complete files in
../shared/goldens and are skipped without them.
"""
import json
from pathlib import Path

import pytest
import torch

from gto.checkpoint import load_head, load_target
from gto.engine import Engine
from gto.model import KV, KVCache, ModelConfig, Prefix, Target
from gto.tree import Tree, TreeShape, ancestor_mask, draft_tree
from gto.verify import Sampling, accept, verify, warp
from tests.test_load import write_release

GOLDENS = Path(__file__).resolve().parents[2] / "shared" / "goldens"
FIXTURE = Path(__file__).with_name("fixtures") / "goldens.pt"
CLOSE = {"atol": 1e-4, "rtol": 1e-4}   # the files' own noise is below 1.5e-5
HEADS = ["eagle_head_trained", "eagle_head_random", "eagle_head_narrow", "eagle_head_fullvocab"]

needs_goldens = pytest.mark.skipif(not GOLDENS.is_dir(), reason="needs the peers' files in ../shared/goldens")


def golden_tensors(name):
    return pytest.importorskip("safetensors.torch").load_file(GOLDENS / name)


def golden_json(name):
    return json.loads((GOLDENS / name).read_text())


@pytest.fixture(scope="module")
def fixture():
    assert FIXTURE.stat().st_size < 300_000
    return torch.load(FIXTURE, weights_only=True)


@pytest.fixture(scope="module")
def eagle():
    """EAGLE's target and the heads for it."""
    pytest.importorskip("safetensors")
    target = load_target(GOLDENS / "eagle_target")
    return target, {name: load_head(GOLDENS / name, target) for name in HEADS}


@torch.no_grad()
def check_target(target, tokens, logits, features, positions=None):
    """As one causal text, and as nodes behind an empty prefix: the two ways a target is called."""
    B, N = tokens.shape
    causal = torch.ones(N, N, dtype=torch.bool).tril().expand(B, N, N)
    positions = torch.arange(N).expand(B, N) if positions is None else positions.expand(B, N)
    empty = Prefix(KVCache(target, B, 1), torch.zeros(B, dtype=torch.long))
    for output in target(tokens, positions), target(tokens, positions, causal, empty):
        torch.testing.assert_close(target.logits(output[0]), logits, **CLOSE)
        if features is not None:
            torch.testing.assert_close(output[1], features, **CLOSE)


def test_target_fixture(fixture, tmp_path):
    """A Llama with llama3 rotary scaling, grouped key heads, tied embeddings and a transformers-5 config."""
    llama = fixture["llama"]
    target = load_target(write_release(tmp_path, llama["config"], llama["weights"]))
    check_target(target, llama["tokens"], llama["logits"], llama["features"])
    check_target(target, llama["tokens"], llama["stretched_logits"], None, llama["stretched_positions"])


@needs_goldens
@pytest.mark.parametrize("folder", [
    "llama_gqa_llama3rope", "llama_mha_tied_bin", "llama_v5config_tied", "qwen3_untied"])
def test_target(folder):
    values = golden_tensors(f"{folder}/expected.safetensors")
    target = load_target(GOLDENS / folder)
    torch.testing.assert_close(target.frequencies, values["inv_freq"])
    for case in "case0", "case1":
        features = torch.cat([values[f"{case}.hidden_states"][i] for i in target.config.taps], dim=-1)
        check_target(target, values[f"{case}.input_ids"], values[f"{case}.logits"], features)
    check_target(target, values["case1.input_ids"], values["stretched.logits"], None, values["stretched.position_ids"])


def eagle_shape(depth, top_k, total_token):
    """EAGLE counts the levels behind the first, and the root among the nodes."""
    return TreeShape(top_k=top_k, depth=depth + 1, nodes=total_token - 1)


@torch.no_grad()
def check_trees(head, features, hidden, logits, case):
    n, tokens = features.shape[1], torch.tensor([case["prompt_ids"][1:] + [case["sampled_token"]]])
    out, keys, values = head(head.fuse(features), tokens, torch.arange(n)[None])
    torch.testing.assert_close(out, hidden, **CLOSE)
    if logits is not None:
        torch.testing.assert_close(head.logits(out), logits, **CLOSE)
    prefix = Prefix(KV([keys], [values]), torch.tensor([n]))
    for golden in case["trees"]:
        shape = eagle_shape(golden["depth"], golden["top_k"], golden["total_token"])
        tree = draft_tree(head, out[:, -1], tokens[:, -1], prefix, shape, 1.0)
        assert tree.tokens[0].tolist() == golden["draft_tokens"]
        assert tree.depth[0].tolist() == golden["tree_position_ids"]
        assert torch.equal(tree.mask[0], golden_mask(golden))
        assert torch.equal(ancestor_mask(tree.parents, shape.depth), tree.mask)


def golden_mask(golden):
    return torch.tensor([[bit == "1" for bit in row] for row in golden["tree_mask"]])


class Recall(Target):
    """In place of a target too large for a fixture: it knows one text. At a position of the text it returns what the
    target computed there, whatever the token; that is right for nodes on the text, and no other can be accepted."""

    def __init__(self, embedding, features, tokens):
        V, dim = embedding.shape
        super().__init__(ModelConfig(vocab_size=V, layers=1, dim=dim, kv_heads=1, head_dim=2))
        self.embed = torch.nn.Embedding.from_pretrained(embedding.float())
        self.features, self.tokens = features[0], tokens[0]

    def forward(self, tokens, positions=None, mask=None, prefix=None):
        positions = torch.arange(tokens.shape[1])[None] if positions is None else positions
        positions = positions.clamp(max=len(self.features) - 1)
        nothing = torch.zeros(len(tokens), 1, tokens.shape[1], 2)
        return self.tokens[positions + 1, None], self.features[positions], [nothing], [nothing]

    def logits(self, hidden):
        return torch.nn.functional.one_hot(hidden.squeeze(-1), self.config.vocab_size).float()


@pytest.fixture
def recalled(fixture, tmp_path):
    """EAGLE's trained head and the stand-in for its target."""
    eagle = fixture["eagle"]
    target = Recall(eagle["embedding"], eagle["loop_features"], eagle["loop_tokens"])
    return target, load_head(write_release(tmp_path, eagle["config"], eagle["weights"]), target)


def test_trees_fixture(fixture, recalled):
    eagle = fixture["eagle"]
    check_trees(recalled[1], eagle["features"], eagle["hidden"], None, eagle["case"])


@needs_goldens
@pytest.mark.parametrize("name", HEADS)
def test_trees(eagle, name):
    target, head = eagle[0], eagle[1][name]
    tensors = golden_tensors("eagle_trees.safetensors")
    cases = [case for case in golden_json("eagle_trees.json")["cases"] if case["head"] == name]
    assert cases
    for case in cases:
        hidden, features, *_ = target(torch.tensor([case["prompt_ids"]]))
        torch.testing.assert_close(features, tensors[f"{case['key']}.features"], **CLOSE)
        assert target.logits(hidden)[0, -1].argmax() == case["sampled_token"]
        check_trees(head, features, tensors[f"{case['key']}.hidden"], tensors[f"{case['key']}.logits"], case)


@torch.no_grad()
def check_loop(target, head, golden):
    """Greedy decoding, round by round: the same trees, the same lengths, the same text."""
    shape = eagle_shape(golden["depth"], golden["top_k"], golden["total_token"])
    engine = Engine(target, head, shape, Sampling(temperature=0.0), capacity=golden["max_length"], score_temp=1.0)
    ids, accepted = engine.prefill([golden["prompt_ids"]]), []
    for i in range(len(golden["accept_lengths"])):
        tree = engine.draft()
        if golden["rounds"]:
            assert tree.tokens[0].tolist() == golden["rounds"][i]["draft_tokens"]
            assert tree.depth[0].tolist() == golden["rounds"][i]["tree_position_ids"]
            assert engine.length.tolist() == [golden["rounds"][i]["n_context"]]
        engine.verify(tree)
        accepted.append(int(engine.num_accepted[0]))
        ids += engine.emitted[0, :accepted[-1] + 1].tolist()
    assert accepted == golden["accept_lengths"]
    # EAGLE returns the tokens of whole rounds, without the bonus of the last one.
    assert ids[:-1] == golden["new_ids"][:len(ids) - 1]
    assert ids[:len(golden["greedy_ids"])] == golden["greedy_ids"][:len(ids)]


def test_loop_fixture(fixture, recalled):
    check_loop(*recalled, fixture["eagle"]["loop"])


@needs_goldens
@pytest.mark.parametrize("name", HEADS)
def test_loops(eagle, name):
    target, head = eagle[0], eagle[1][name]
    loops = [loop for loop in golden_json("eagle_loops.json")["loops"] if loop["head"] == name]
    assert loops
    for loop in loops:
        check_loop(target, head, loop)
        plain = Engine(target, None, capacity=loop["max_length"])
        (ids,) = plain.complete([loop["prompt_ids"]], len(loop["greedy_ids"]))
        assert ids == loop["prompt_ids"] + loop["greedy_ids"]


def golden_tree(golden):
    """A Tree from what EAGLE recorded of it: the parent is the deepest ancestor but the node itself."""
    mask = golden_mask(golden)[None]
    depth = mask.sum(-1) - 1
    above = mask & ~torch.eye(mask.shape[1], dtype=torch.bool)
    parents = torch.where(above, depth[:, None], -1).argmax(-1)
    return Tree(torch.tensor([golden["draft_tokens"]]), parents, mask, depth, torch.zeros_like(depth).float())


def attempts(p, tree, node):
    """EAGLE's rule: try the children in turn, accept x with probability p(x), else p(x) = 0 and renormalise.

    p [N, V] the target's distribution after each node. -> [(child, its chance)], what is left if all are rejected."""
    chances, rest = [], p[node].clone()
    for child in range(1, tree.tokens.shape[1]):                  # in order of creation, which is EAGLE's
        if tree.parents[0, child] == node:
            token = tree.tokens[0, child]
            chances.append((child, rest[token].clone()))
            rest[token] = 0
            rest = rest / rest.sum().clamp(min=1e-300)
    return chances, rest


def rejection_walk(p, tree, draws):
    """-> the accepted nodes, the distribution of the next token."""
    path, draws = [0], iter(draws)
    while True:
        chances, rest = attempts(p, tree, path[-1])
        accepted = next((child for child, chance in chances if next(draws) <= chance), None)
        if accepted is None:
            assert next(draws, None) is None                      # it took as many draws as EAGLE did
            return path, rest
        path.append(accepted)


def rejection_law(p, tree):
    """The exact distribution of EAGLE's rule: [N, V], the probability to stop at node n and emit token x there."""
    law, reach = torch.zeros_like(p), torch.eye(len(p), dtype=p.dtype)[0]
    for node in range(len(p)):
        chances, rest = attempts(p, tree, node)
        left = reach[node].clone()                                # that all children so far were rejected
        for child, chance in chances:
            reach[child], left = left * chance, left * (1 - chance)
        law[node] = left * rest
    return law


def our_law(p, tree):
    """The exact distribution of our rule, by letting `accept` decide all outcomes.

    For every node n and token x, all nodes' draws are set so that n is reached and draws x; nodes off that path draw
    a child's token, the worst case. The outcome's weight is the product of the draws' probabilities along the path."""
    (N, V), law = p.shape, torch.zeros_like(p)
    children = [[child for child in range(1, N) if tree.parents[0, child] == node] for node in range(N)]
    lure = torch.tensor([tree.tokens[0, (below or [0])[0]] for below in children])
    many = Tree(*(x.expand(V, *x.shape[1:]) for x in tree))
    width = int(tree.depth.max()) + 1
    for node in range(N):
        choice, weight, child = lure.repeat(V, 1), p[node].clone(), node
        choice[:, node] = torch.arange(V)
        while child != 0:
            parent = int(tree.parents[0, child])
            choice[:, parent] = tree.tokens[0, child]
            weight *= p[parent, tree.tokens[0, child]]
            child = parent
        path, count, emitted = accept(many, choice, width)
        last = path.gather(1, count[:, None]).squeeze(1)
        stays = last == node
        assert torch.equal(emitted[stays], torch.arange(V)[stays])
        assert (~stays).sum() == len(children[node])              # only a child's token leads further
        law[node, stays] = weight[stays]
    return law


def check_verification(tree, logits, runs, sample_p):
    """logits [N, V]; sample_p [runs, V]"""
    settings = {}
    for run, golden in zip(runs, sample_p):
        setting = run["temperature"], run["top_k"], run["top_p"] or 1.0              # EAGLE: 0 is off
        settings[setting] = p = warp(logits, Sampling(*setting)).softmax(-1)
        path, rest = rejection_walk(p, tree, run["draws"])
        assert path == run["path_nodes"]
        torch.testing.assert_close(rest, golden, **CLOSE)
    for p in settings.values():
        law = our_law(p.double(), tree)
        torch.testing.assert_close(law.sum(), torch.ones((), dtype=torch.double))
        torch.testing.assert_close(law, rejection_law(p.double(), tree), atol=1e-7, rtol=1e-5)


def test_verification_fixture(fixture):
    """Nodes that the recorded runs do not visit get random logits: the law must agree there, too."""
    golden = fixture["verify"]
    tree = golden_tree(next(t for t in fixture["eagle"]["case"]["trees"] if t["total_token"] == 16))
    logits = 3 * torch.randn(16, golden["logits"].shape[1], generator=torch.Generator().manual_seed(0))
    logits[golden["nodes"]] = golden["logits"]
    check_verification(tree, logits, golden["runs"], golden["sample_p"])


@needs_goldens
def test_verification():
    trees = {case["key"]: case["trees"] for case in golden_json("eagle_trees.json")["cases"]}
    tensors = golden_tensors("eagle_verify.safetensors")
    for case in golden_json("eagle_verify.json")["cases"]:
        tree, logits = golden_tree(trees[case["tree_case"]][case["tree_index"]]), tensors[case["node_logits"]]
        check_verification(tree, logits, case["runs"], [tensors[run["sample_p"]] for run in case["runs"]])
        path, count, emitted = verify(logits[None], tree, Sampling(), int(tree.depth.max()) + 1)
        assert count.tolist() == [case["greedy"]["accept_length"]]
        assert path[0, :count[0] + 1].tolist() == case["greedy"]["path_nodes"]
        assert emitted[0, count[0]] == logits[case["greedy"]["path_nodes"][-1]].argmax()
