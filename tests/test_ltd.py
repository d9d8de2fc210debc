"""Learning to Draft: the replay against live decoding, the policies, PPO."""
import itertools
import json
import sys
from copy import deepcopy
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import gto.policy
from gto.checkpoint import finish
from gto.config import Config
from gto.data import prepare
from gto.engine import Engine
from gto.ltd import __main__ as ltd, ppo
from gto.ltd.ppo import Learned, load_policy, save_policy
from gto.ltd.replay import Recording, best_fixed, decide, drive, oracle, record, replay, seconds_by_choice
from gto.policy import AdaptiveEngine, Costs, Echo, Fixed, Rule, Space, costs_here, policy_path
from gto.verify import Sampling
from tests.test_engine import GraphsOnCpu
from tests.tiny import tiny_models, tiny_prompts

SPACE, POSITIONS = Space(3, 4, (0, 1, 2, 5, 9)), 24
WIDTH = Learned(SPACE, 4).width
PROMPTS = [(prompt * 8)[:8] for prompt in tiny_prompts(6)]
# A made-up machine: a target step takes 1 s, a level 0.2 s, a node 0.05 s.
PARTS = Costs(SPACE, 0.2 * np.arange(5), 1 + 0.05 * np.array(SPACE.sizes), np.zeros(5))
COSTS = seconds_by_choice(PARTS)


class Whimsical(Fixed):
    """A policy whose decisions vary with the context's length."""
    space = SPACE

    def __init__(self):
        pass

    def stop(self, observation):
        observation = torch.as_tensor(observation)
        return observation[..., 0] * 4 >= (observation[..., 1] * 1000).round() % 5

    def size(self, observation):
        return ((torch.as_tensor(observation)[..., 1] * 1000).round() / 4 % 5).long()


class Spy:
    """Asks another policy and keeps (level, size) and the observation of every cycle."""

    def __init__(self, policy):
        self.space, self.policy, self.learn, self.decisions, self.seen = policy.space, policy, policy.learn, [], []

    def stop(self, seen):
        stops = self.policy.stop(seen)
        if stops and seen[0] == 0:
            self.decisions.append((0, 0)), self.seen.append(seen)
        return stops

    def size(self, seen):
        size = int(self.policy.size(seen))
        self.decisions.append((round(seen[0] * SPACE.depth), size)), self.seen.append(seen)
        return size


@pytest.fixture(scope="module")
def models():
    target, head = tiny_models(seed=2, spread=0.2)
    return target, head.requires_grad_(False)


@pytest.fixture(scope="module")
def recording(models):
    return record(*models, PROMPTS, POSITIONS, SPACE)


def live_cycles(engine):
    """(root, accepted drafts) of every cycle that starts at a recorded root."""
    for i, prompt in enumerate(PROMPTS):
        engine.prefill([prompt])
        cycles, root = engine.cycles(), i * POSITIONS
        while root < (i + 1) * POSITIONS:
            (tokens,) = next(cycles)
            yield root, len(tokens) - 1
            root += len(tokens)


@pytest.mark.parametrize("policy", [Whimsical(), *itertools.starmap(partial(Fixed, SPACE), (
    (0, 0), (1, 0), (1, 4), (2, 2), (3, 3), (4, 1), (4, 4)))])
def test_replay_equals_live_decoding(models, recording, policy):
    spy = Spy(policy)
    live = list(live_cycles(AdaptiveEngine(*models, spy)))
    level, size = decide(policy, recording)
    replayed = replay(recording, COSTS, level, size)
    rate, tau, roots = replayed.rate, replayed.tau, replayed.roots
    level, size = level[roots], size[roots] * (level[roots] > 0)
    assert live == list(zip(roots, recording.accepted[roots, level, size].tolist()))
    assert spy.decisions == list(zip(level.tolist(), size.tolist()))
    assert tau == pytest.approx(sum(accepted + 1 for _, accepted in live) / len(live)) and (tau > 1 or not size.any())
    assert rate == pytest.approx(tau / COSTS[level, size].mean().item())
    torch.testing.assert_close(torch.tensor(spy.seen), recording.observation[roots, level], atol=1e-5, rtol=1e-4)


def test_between_questions_nobody_asks(models, recording):
    """A policy that would stop anywhere stops where it is asked, live and replayed."""
    sparse = replace(SPACE, every=2)
    for depth, stops in ((1, 2), (2, 2), (3, 4), (4, 4)):
        spy = Spy(Fixed(sparse, depth, 3))
        live = list(live_cycles(AdaptiveEngine(*models, spy)))
        assert set(spy.decisions) == {(stops, 3)}
        driven = drive(Fixed(sparse, depth, 3), recording, PARTS._replace(space=sparse))
        assert driven.roots == [root for root, _ in live]
        assert set(decide(Fixed(sparse, depth, 3), recording)[0].tolist()) == {stops}
    rule = Rule(PARTS._replace(space=sparse))
    assert not rule.stop(looking(2, 1.0)) and rule.stop(looking(2, 0.0))


@pytest.mark.parametrize("policy", [Learned(SPACE, 16), Rule(PARTS), Whimsical()], ids=type)
def test_greedy_output_is_the_targets(models, policy):
    """From CUDA graphs, too: every part finds its input where the part before left it, whichever parts a cycle has."""
    torch.manual_seed(0)
    for p in policy.parameters() if isinstance(policy, Learned) else ():
        torch.nn.init.normal_(p)                                   # random, and therefore varied, decisions
    plain, *both = Engine(models[0], None), *(AdaptiveEngine(*models, Spy(deepcopy(policy))) for _ in range(2))
    (eager, replayed), spy = both, both[1].policy
    replayed.run = GraphsOnCpu(replayed.device, replayed.run.state)
    replayed.capture_graphs()
    captured = set(replayed.run.graphs)
    for prompt in PROMPTS:
        assert plain.complete([prompt], 32) == eager.complete([prompt], 32) == replayed.complete([prompt], 32)
    assert spy.decisions == eager.policy.decisions and len(set(spy.decisions)) > 2
    assert set(replayed.run.graphs) <= captured | {"plain"}, "captured while the clock ran"
    short = AdaptiveEngine(*models, policy, capacity=31)
    assert all(short.complete([p], 32) == [plain.complete([p], 32)[0][:31]] for p in PROMPTS), "to the last position"


def test_sampled_tokens_are_the_targets():
    """At T=1 the token of a cycle is drawn from the target's distribution, whatever was drafted and verified."""
    target, head = tiny_models(seed=4, vocab=5, spread=0.3)
    engine = AdaptiveEngine(target, head, Fixed(Space(2, 3, (0, 1, 2, 4)), 2, 2), Sampling(1.0))
    torch.manual_seed(0)
    (root,), drawn = engine.prefill([[1, 2, 3]]), torch.zeros(5)
    before = [x.clone() for x in engine.run.state]
    for _ in range(600):
        engine.uniform.uniform_()
        drawn[next(engine.cycles())[0][0]] += 1
        for x, was in zip(engine.run.state, before):
            x.copy_(was)
    with torch.no_grad():
        p = target.logits(target(torch.tensor([[1, 2, 3, root]]))[0][0, -1]).softmax(-1)
    assert ((drawn / 600 - p).abs() < 4 * (p * (1 - p) / 600).sqrt()).all()


def looking(drafted, probability, certainty=0.5):
    """What is seen after some levels whose nodes all have this probability; certainty: the target's, of the root."""
    return [drafted / SPACE.depth, 0.1, 0, certainty, 0, 0, *[probability] * (WIDTH - 6)]


def test_rule_at_the_extremes():
    rule = Rule(PARTS)
    for depth in range(1, SPACE.depth):
        sure, hopeless = looking(depth, 1.0), looking(depth, 0.0)
        assert not rule.stop(sure) and rule.size(sure) == len(SPACE.sizes) - 1 and not rule.stop(looking(0, 0.0))
        assert rule.stop(hopeless) and rule.size(hopeless) == 0


def test_rule_leaves_hopeless_drafts_out_and_comes_back():
    """Cycles that bring nothing become rare, doubling up to the longest wait; ones that pay end that. Roots of which
    the target was sure are another matter."""
    rule, looks = Rule(PARTS), []
    for cycle in range(200):
        if not rule.stop(looking(0, 0.0, certainty=0.01)):
            looks.append(cycle)
            rule.size(looking(1, 0.0))
        rule.learn(0)
    assert np.diff(looks).tolist() == [2, 3, 5, 9, 17, 33, 65, 65] and not rule.stop(looking(0, 0.0, certainty=0.99))
    for cycle in range(200):
        if not rule.stop(looking(0, 0.0, certainty=0.01)):
            rule.size(looking(1, 1.0))
        rule.learn(4)
    assert not rule.stop(looking(0, 0.0, certainty=0.01)) and rule.patience[0] == 1


def test_rule_trusts_what_came_true():
    """Where drafts are accepted half as often as promised, it comes to verify as if their probability were half."""
    rule, seen = Rule(PARTS), looking(1, 0.3)                      # many nodes of .3 each: promising, if it were true
    before = rule.size(seen)
    for _ in range(300):
        rule.stop(looking(0, 0.0)), rule.size(seen), rule.learn(0)
    assert before > 0 == rule.size(seen)


def test_echo():
    """Against a search for the last place where the text's last two tokens stood before."""
    text = torch.randint(3, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    echo, repeats = Echo(), 0
    for end in range(1, len(text)):
        at = max([at for at in range(2, end) if text[at - 2:at] == text[end - 2:end]], default=0)
        same = max(n for n in range(min(at, 8) + 1) if text[at - n:at] == text[end - n:end])
        assert echo.read(text[end - 1:end]) == (same / 8, text[at] if at else -1)
        repeats += same > 2
    assert repeats > 50


@pytest.mark.parametrize("memory", [0.98, 0.5])
def test_rule_replayed_equals_rule_live(models, recording, memory):
    live, driven = Rule(PARTS), Rule(PARTS)
    live.memory = driven.memory = memory
    spy = Spy(live)
    cycles = list(live_cycles(AdaptiveEngine(*models, spy)))
    replayed = drive(driven, recording, PARTS)
    assert replayed.tau == pytest.approx(sum(accepted + 1 for _, accepted in cycles) / len(cycles))
    assert replayed.roots == [root for root, _ in cycles]


def test_oracle_is_the_best_there_is(recording):
    """Against all sequences of decisions on the first positions of a text, and against every fixed choice."""
    short = Recording(4, recording.observation[:4], recording.accepted[:4])
    cost, step = COSTS.flatten().tolist(), (short.accepted.flatten(1) + 1).tolist()

    def least(root):
        return 0.0 if root >= 4 else min(c + least(root + n) for c, n in zip(cost, step[root]))

    level, size = oracle(short, COSTS)
    roots = replay(short, COSTS, level, size).roots
    assert COSTS[level, size][roots].sum().item() == pytest.approx(least(0), rel=1e-5)
    rate = best_fixed(recording, COSTS, SPACE)[-1].rate
    assert rate == max(replay(recording, COSTS, *decide(Fixed(SPACE, depth, size), recording)).rate
                       for depth, size in itertools.product(range(1, 5), range(1, 5)))
    assert replay(recording, COSTS, *oracle(recording, COSTS)).rate >= rate * (1 - 1e-6)


def test_advantages():
    """Against all ways to go on, one by one: an episode ends where a level is chosen, each with its probability."""
    torch.manual_seed(0)
    n, levels, sizes = 3, 4, 5
    stop, size = torch.randn(n, levels, 2).log_softmax(-1), torch.randn(n, levels, sizes).log_softmax(-1)
    reward = torch.randn(n, levels, sizes)
    depth, of_sizes = ppo.advantages((stop, size), reward)
    for i, level in itertools.product(range(n), range(levels)):
        worth = [(size[i, l].exp() * reward[i, l]).sum() for l in range(levels)]

        def ahead(at):                                             # expected reward if it comes to be asked there
            p = stop[i, at].exp()
            return worth[at] if at == levels - 1 else p[1] * worth[at] + p[0] * ahead(at + 1)

        torch.testing.assert_close(of_sizes[i, level], reward[i, level] - worth[level])
        if level < levels - 1:
            want = torch.stack([ahead(level + 1), worth[level]]) - ahead(level)
            torch.testing.assert_close(depth[i, level], want)


def test_learning_finds_what_can_be_known(recording, monkeypatch):
    """A made-up target accepts everything or nothing, and the draft's probabilities say which."""
    monkeypatch.setattr(ppo, "UPDATES", 40)
    monkeypatch.setattr(ppo, "BUFFER", 256)
    torch.manual_seed(0)
    easy = torch.rand(len(recording.accepted)) < 0.5
    kept = torch.tensor([[min(d, SPACE.nodes(d, s)) if d else 0 for s in range(len(SPACE.sizes))] for d in range(5)])
    seen = recording.observation.clone()
    seen[:, :, 3:] = easy[:, None, None].float()
    made_up, learned = Recording(POSITIONS, seen, easy[:, None, None] * kept), Learned(SPACE, 32)
    rate = best_fixed(made_up, COSTS, SPACE)[-1].rate
    ppo.learn(learned, [made_up], COSTS)
    possible = replay(made_up, COSTS, *oracle(made_up, COSTS)).rate
    assert replay(made_up, COSTS, *decide(learned, made_up)).rate > rate + 0.7 * (possible - rate)


def test_costs_are_measured_once_a_machine(models, tmp_path, monkeypatch):
    costs = costs_here(tmp_path, *models, SPACE)
    assert (costs.verify > 0).all() and (np.diff(costs.draft) > 0).all() and len(costs.draft) == 5
    asked = seconds_by_choice(costs, Learned(SPACE, 16)) - seconds_by_choice(costs)
    assert asked.shape == (5, 5) and (asked > 0).all()
    again = costs_here(tmp_path, *models, SPACE)
    assert again.draft.tolist() == costs.draft.tolist() and again.verify.tolist() == costs.verify.tolist()
    for change in (lambda: monkeypatch.setattr("platform.node", lambda: "another machine"),
                   lambda: Path(tmp_path, "costs.json").write_text("[1")):
        before = costs_here(tmp_path, *models, SPACE).draft.tolist()
        change()
        assert costs_here(tmp_path, *models, SPACE).draft.tolist() != before


def test_policy_files(tmp_path):
    path, learned, seen = tmp_path / "policy.pt", Learned(SPACE), torch.rand(7, WIDTH)
    save_policy(path, learned, gain=0.25)
    loaded, gain = load_policy(path)
    assert [loaded.stop(row) for row in seen.tolist()] == learned.stop(seen).tolist()  # plain Python says as torch does
    assert torch.equal(loaded.size(seen), learned.size(seen)) and loaded.space == SPACE and gain == 0.25


def test_the_program(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("words.txt").write_text("".join(f"def f{i}(x):\n    return x + {i}\n\n\n" for i in range(3000)))
    prepare("data", inputs=["words.txt"], vocab_size=320)
    for name, model in zip(("target", "gto"), tiny_models(vocab=320)):
        finish(name, model, Path("out"))
    for name in ("tokenizer.model", "meta.json"):
        Path("out", name).write_bytes(Path("data", name).read_bytes())
    Path("out/prompts.jsonl").write_text("\n".join(Path("data/prompts.jsonl").read_text().splitlines()[:16]))
    Path("out/config.json").write_text(json.dumps(asdict(Config(tree="3,3,6", eval_tokens=12))))
    for module, name, value in ((ltd, "CHILDREN", (3, 2)), (gto.policy, "SPACES", {"cpu": SPACE}), (ppo, "UPDATES", 1),
                                (ppo, "EPOCHS", 2)):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(sys, "argv", ["gto.ltd", "--device", "cpu"])
    ltd.main()
    lines = Path("out/ltd.md").read_text()
    assert all(f"| out/gto.pt | {T} | {way}" in lines for T in (0, 1) for way in (
        "plain", "best fixed tree, ", "entropy |", "running mean of acceptances (GammaTune) |", "rule |", "LTD |",
        "oracle |"))
    assert load_policy(policy_path("out/gto.pt"))[0].space.depth == SPACE.depth
