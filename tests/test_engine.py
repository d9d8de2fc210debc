"""Losslessness at T=0, and the engine's state against a forward over the whole text."""
import pytest
import torch

from gto.engine import Engine
from gto.errors import UserError
from gto.tree import TreeShape
from tests.tiny import tiny_models, tiny_prompts


def continuation(engine, prompts, count, stop=()):
    rows = [[] for _ in prompts]
    for new in engine.generate(prompts, count, stop):
        for row, tokens in zip(rows, new):
            row += tokens
    return rows


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


@torch.no_grad()
def test_caches_hold_what_a_full_forward_would():
    """After some cycles: the target's cache, the head's cache and the pending features, position by position."""
    target, head = tiny_models(seed=2, spread=0.2)
    prompts = tiny_prompts(4, seed=3)
    engine = Engine(target, head, TreeShape(4, 3, 12), batch=4)
    rows = [p + [t] for p, t in zip(prompts, engine.prefill(prompts))]
    for _ in range(6):
        engine.check(engine.draft())
        for b, row in enumerate(rows):
            row += engine.emitted[b, :engine.count[b] + 1].tolist()
    assert any(len(row) - len(p) > 7 for row, p in zip(rows, prompts)), "nothing was accepted: the test shows nothing"
    for b, row in enumerate(rows):
        tokens = torch.tensor([row])
        _, features, keys, values = target(tokens[:, :-1])
        n, a = len(row) - 1, int(engine.count[b])
        assert engine.length[b] == n
        for layer in range(target.config.layers):
            torch.testing.assert_close(engine.target_cache.k[layer, b, :, :n], keys[layer][0], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(engine.target_cache.v[layer, b, :, :n], values[layer][0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(engine.features[b, :a + 1], features[0, n - 1 - a:], atol=1e-4, rtol=1e-4)
        slots = torch.arange(n)[None]
        _, k, _ = head(head.fuse(features), tokens[:, 1:], slots)
        done = n - 1 - a                                           # the last path's slots are filled by the next draft
        torch.testing.assert_close(engine.head_cache.k[0, b, :, :done], k[0, :, :done], atol=1e-4, rtol=1e-4)


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


@pytest.mark.parametrize("prompt, message", [([], "empty prompt"), ([1] * 256, "256 tokens")])
def test_bad_prompts(prompt, message):
    with pytest.raises(UserError, match=message):
        Engine(*tiny_models()).prefill([prompt])


@torch.no_grad()
def test_drafting_agrees_with_training():
    """A drafted chain's scores are the log-probabilities that training computes for the same tokens."""
    target, head = tiny_models(seed=4)
    prompt = tiny_prompts(1, seed=5)[0] + [3, 4]
    engine = Engine(target, head, TreeShape(1, 5, 5), score_temp=1.0)
    root = engine.prefill([prompt])
    tree = engine.draft()
    _, features, _, _ = target(torch.tensor([prompt]))
    hidden = head.unroll(features, torch.tensor([prompt[1:] + root]), torch.tensor([[len(prompt) - 1]]),
                         tree.tokens[:, None, 1:-1])
    log_q = torch.log_softmax(head.logits(hidden), -1)[0, 0]       # [5, V]
    path = log_q.gather(-1, tree.tokens[0, 1:, None]).squeeze(-1).cumsum(0)
    torch.testing.assert_close(path, tree.scores[0, 1:], atol=1e-4, rtol=1e-4)
