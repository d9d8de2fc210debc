"""Losslessness at T=0, and the engine's state against a forward over the whole text."""
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gto.model
from gto.engine import Engine
from gto.evaluate import timed
from gto.tree import TreeShape
from gto.util import UserError
from gto.verify import Sampling
from kernels.graphs import Graphs
from tests.tiny import tiny_models, tiny_prompts


def continuation(engine, prompts, count, stop=()):
    return [sum(new, []) for new in zip(*engine.generate(prompts, count, stop))]


@torch.no_grad()
def by_hand(target, prompt, count):
    """Greedy decoding with a full forward for every token."""
    tokens = list(prompt)
    for _ in range(count):
        hidden, *_ = target(torch.tensor([tokens]))
        tokens.append(target.logits(hidden[0, -1]).argmax().item())
    return tokens[len(prompt):]


@pytest.mark.parametrize("shape", ["1,3,3", "4,3,8", "8,5,24", "10,7,60"])
def test_greedy_output_is_the_targets(shape):
    target, head = tiny_models(seed=1)
    prompts = tiny_prompts(8)
    expected = [by_hand(target, prompt, 40) for prompt in prompts]
    assert continuation(Engine(target, None, batch=8), prompts, 40) == expected
    assert continuation(Engine(target, head, TreeShape.parse(shape), batch=8), prompts, 40) == expected


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.8, top_k=5, top_p=0.9)], ids=str)
def test_the_same_seed_writes_the_same_text_by_any_tree(sampling):
    target, head = tiny_models(seed=1)

    def written(head, shape, seed):
        torch.manual_seed(seed)
        return Engine(target, head, shape, sampling, batch=8).complete(tiny_prompts(8), 40)

    plain = written(None, None, 3)
    assert plain == written(head, TreeShape(4, 3, 8), 3) == written(head, TreeShape(1, 6, 6), 3)
    assert plain != written(None, None, 4)


@torch.no_grad()
@pytest.mark.parametrize("rows", [(1,), (3,), (2, 9), (1, 70)], ids=str)
def test_a_large_frozen_weight_is_kept_packed_and_multiplies_the_same(rows):
    torch.manual_seed(0)
    layer, x = gto.model.Linear(520, 512), torch.randn(*rows, 520)
    assert torch.equal(layer(x), x @ layer.weight.T) and layer.packed is None         # it may still learn
    layer.requires_grad_(False)
    torch.testing.assert_close(layer(x), (x.double() @ layer.weight.T.double()).float(), atol=1e-5, rtol=1e-5)
    assert (layer.packed is not None) == torch.backends.mkldnn.is_available()
    assert list(layer.state_dict()) == ["weight"]
    with torch.enable_grad():
        x.requires_grad_().retain_grad()
        layer(x).sum().backward()                                 # a gradient may go through it
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand_as(x))


@torch.no_grad()
def test_caches_hold_what_a_full_forward_would():
    """After some cycles: the target's cache, the head's cache and the pending features, position by position."""
    target, head = tiny_models(seed=2, spread=0.2)
    prompts = tiny_prompts(4, seed=3)
    engine = Engine(target, head, TreeShape(4, 3, 12), batch=4)
    rows = [p + [t] for p, t in zip(prompts, engine.prefill(prompts))]
    for _ in range(6):
        engine.verify(engine.draft())
        for b, row in enumerate(rows):
            row += engine.emitted[b, :engine.num_accepted[b] + 1].tolist()
    assert any(len(row) - len(p) > 7 for row, p in zip(rows, prompts)), "nothing was accepted: the test shows nothing"
    for b, row in enumerate(rows):
        tokens = torch.tensor([row])
        _, features, keys, values = target(tokens[:, :-1])
        n, a = len(row) - 1, int(engine.num_accepted[b])
        assert engine.length[b] == n
        _, k, _ = head(head.fuse(features), tokens[:, 1:], torch.arange(n)[None])
        done = n - 1 - a                                           # the last path's slots are filled by the next draft
        for found, expected in ((engine.target_cache.k[:, b, :, :n], torch.cat(keys)),
                                (engine.target_cache.v[:, b, :, :n], torch.cat(values)),
                                (engine.features[b, :a + 1], features[0, done:]),
                                (engine.head_cache.k[0, b, :, :done], k[0, :, :done])):
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_limits():
    target, head = tiny_models(seed=1)
    prompt = tiny_prompts(1)[0]
    full = continuation(Engine(target, head), [prompt], 30)[0]
    assert len(full) == 30
    assert continuation(Engine(target, head), [prompt], 7)[0] == full[:7]
    stop = full[11]
    assert continuation(Engine(target, head), [prompt], 30, stop={stop})[0] == full[:full.index(stop) + 1]
    short = Engine(target, head, capacity=len(prompt) + 5)
    assert continuation(short, [prompt], 30)[0] == full[:5]
    assert continuation(short, [prompt], 30)[0] == full[:5], "an engine can be used again"
    tight = Engine(target, head, TreeShape(1, 6, 6), capacity=3)
    tight.prefill([prompt[:1]]), tight.length.fill_(3), tight.num_accepted.fill_(5)   # a draft that passed the end
    assert len(next(tight.cycles())[0]) >= 1, "a cycle queued behind the end of a sequence is harmless"


@pytest.mark.parametrize("shape", [None, "1,6,6", "4,3,8", "10,7,60"])
def test_the_context_is_filled_to_its_last_position(shape):
    target, head = tiny_models(seed=1)
    prompts = [(tiny_prompts(1)[0] * 256)[:length] for length in (255, 254, 252, 230)]     # one token of room, two, ..
    engine = Engine(target, head if shape else None, shape and TreeShape.parse(shape), batch=4)
    expected = [prompt + by_hand(target, prompt, 256 - len(prompt)) for prompt in prompts]
    assert engine.complete(prompts, 300) == expected and engine.capacity == 256


@pytest.mark.parametrize("prompt, message", [([], "empty prompt"), ([1] * 256, "256 tokens")])
def test_bad_prompts(prompt, message):
    with pytest.raises(UserError, match=message):
        Engine(*tiny_models()).prefill([prompt])


class NoSync(TorchDispatchMode):
    """Fails on operations whose result the host must wait for, or whose output shape depends on values."""
    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert not any(name in function.name() for name in self.FORBIDDEN), f"{function.name()} waits for the device"
        return function(*args, **(kwargs or {}))


def without_looking(q, k, v, mask, k_cache, v_cache, length, sequence=None):
    """The reference on the whole cache: like the kernel, it never tells the host how long the prefixes are."""
    S = k_cache.shape[2]
    seen = (torch.arange(S) < length[:, None])[:, None].expand(-1, q.shape[2], -1)
    k, v = torch.cat([k_cache[:len(q)], k], dim=2), torch.cat([v_cache[:len(q)], v], dim=2)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1, output_size=q.shape[1]) for x in (k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, torch.cat([seen, mask], dim=2)[:, None])


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0), Sampling(0.8, top_k=5, top_p=0.9)], ids=str)
@torch.no_grad()
def test_a_cycle_never_waits_for_the_device(monkeypatch, sampling):
    """What a CUDA graph needs: a cycle of fixed shapes that reads no value on the host. Only the attention reference
    reads one (the longest prefix); in its place stands a version that, like the kernel, does not."""
    target, head = tiny_models(seed=1)
    prompts = tiny_prompts(3)
    for drafter, shape in (head, TreeShape(4, 3, 12)), (None, None):
        engine = Engine(target, drafter, shape, sampling, 3, 64)
        engine.prefill(prompts)
        before = [x.clone() for x in engine.run.state]
        torch.manual_seed(0)
        engine.cycle()
        expected = [x.clone() for x in engine.run.state]
        for x, was in zip(engine.run.state, before):
            x.copy_(was)
        torch.manual_seed(0)
        with monkeypatch.context() as patch, NoSync():
            patch.setattr(gto.model, "tree_attention", without_looking)
            engine.cycle()
        for found, want in zip(engine.run.state, expected):
            torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)


class GraphsOnCpu(Graphs):
    """What CUDA graphs do, without a GPU: what was captured is replayed, into the tensors of the capture's results."""

    def __call__(self, key, part):
        if key not in self.graphs:
            before = [x.clone() for x in self.state]
            part(), part()
            self.graphs[key] = part, part()
            for x, was in zip(self.state, before):
                x.copy_(was)
        part, results = self.graphs[key]
        for result, new in zip(tree_leaves(results), tree_leaves(part())):
            if isinstance(result, torch.Tensor):
                result.copy_(new)
        return results


@pytest.mark.parametrize("kind", ["plain", "fixed"])
def test_cycles_replayed_from_graphs(kind):
    """Every part finds its input where the part before has left it; what capturing does to the state is undone."""
    target, head = tiny_models(seed=2, spread=0.2)
    eager, replayed = (Engine(target, head if kind == "fixed" else None, TreeShape(3, 4, 9)) for _ in range(2))
    replayed.run = GraphsOnCpu(replayed.device, replayed.run.state)
    for step in (lambda: replayed.run("cycle", replayed.cycle),
                 lambda: replayed.run("verify", partial(replayed.verify, replayed.run("draft", replayed.draft)))):
        replayed.step = step
        pairs = [(timed(replayed, prompt, 40), timed(eager, prompt, 40)) for prompt in tiny_prompts(6, seed=3)]
        assert all((a.tokens, a.cycles) == (b.tokens, b.cycles) for a, b in pairs)
        assert kind == "plain" or len({a.cycles for a, _ in pairs}) > 2, "little was accepted: the test shows nothing"
