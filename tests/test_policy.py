"""Learning to Draft: the replay against live decoding, the policies, PPO."""
import itertools

import pytest
import torch

from gto import ltd
from gto.adaptive import AdaptiveEngine
from gto.engine import Engine
from gto.errors import UserError
from gto.policy import Costs, Fixed, Learned, Rule, Space, load_policy, mlp, save_policy
from gto.ppo import BUFFER, ppo
from gto.replay import Depth, Recording, Size, best_fixed, decide, measure, oracle, record, replay, seconds, walk
from gto.tree import TreeShape
from gto.verify import Sampling
from tests.tiny import tiny_models, tiny_prompts

SPACE = Space(3, 4, (0, 1, 2, 5, 9))
PLACES = 24


def costs(space=SPACE, contexts=2):
    """A made-up machine: a target step takes 1 s, a level 0.2 s, a node 0.05 s."""
    level = 1 + torch.arange(space.levels)
    nodes = torch.tensor([[space.nodes(d, s) for s in range(len(space.sizes))] for d in level.tolist()])
    return Costs((0.2 * level).expand(contexts, -1).clone(), (1 + 0.05 * nodes).expand(contexts, -1, -1).clone())


@pytest.fixture(scope="module")
def models():
    target, head = tiny_models(seed=2, spread=0.2)
    return target, head.requires_grad_(False)


@pytest.fixture(scope="module")
def recording(models):
    return record(*models, prompts(), PLACES, SPACE)


def prompts():
    return [(prompt * 8)[:8] for prompt in tiny_prompts(6)]


def live_cycles(engine, prompt):
    """(place of the root, accepted drafts) of every cycle that starts among the recorded places."""
    engine.prefill([prompt])
    place, cycles = 0, []
    for (tokens,) in engine.cycles():
        cycles.append((place, len(tokens) - 1))
        place += len(tokens)
        if place >= PLACES:
            return cycles


@pytest.mark.parametrize("level, size", [(1, 0), (1, 4), (2, 2), (3, 3), (4, 1), (4, 4)])
def test_replay_equals_live_decoding(models, recording, level, size):
    policy = Fixed(SPACE, level, size)
    _, tau, visited = walk(recording, costs(), *decide(policy, recording))
    engine, steps = AdaptiveEngine(*models, policy), []
    for i, prompt in enumerate(prompts()):
        cycles = live_cycles(engine, prompt)
        assert [place for place, _ in cycles] == visited.view(-1, PLACES)[i].nonzero().flatten().tolist()
        assert [n for _, n in cycles] == [recording.accepted[i * PLACES + p, level - 1, size].item() for p, _ in cycles]
        steps += [n + 1 for _, n in cycles]
    assert tau == pytest.approx(sum(steps) / len(steps))
    assert {(d, n) for d, n, _ in engine.decisions} == {(level, SPACE.nodes(level, size))}
    assert size < 4 or level < 4 or tau > 1.1, "nothing was accepted: the test shows nothing"


def test_observations_in_training_and_decoding(models, recording):
    engine = AdaptiveEngine(*models, Fixed(SPACE, 3, 3))
    for i, prompt in enumerate(prompts()):
        engine.decisions.clear()
        for (place, _), (level, _, seen) in zip(live_cycles(engine, prompt), engine.decisions):
            assert seen.shape == (1, SPACE.width)
            torch.testing.assert_close(seen[0], recording.seen[i * PLACES + place, level - 1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("policy", [Learned(SPACE, 16), Rule(SPACE, costs(), 1.5)], ids=["learned", "rule"])
def test_greedy_output_is_the_targets(models, policy):
    torch.manual_seed(0)
    if isinstance(policy, Learned):                                # random, and therefore varied, decisions
        for p in policy.parameters():
            torch.nn.init.normal_(p)
    engine, plain = AdaptiveEngine(*models, policy), Engine(models[0], None)
    for prompt in prompts():
        adaptive, expected = ([new[0] for new in e.generate([prompt], 40)] for e in (engine, plain))
        assert sum(adaptive, []) == sum(expected, [])
    assert len({decision[:2] for decision in engine.decisions}) > 2


def test_sampled_tokens_are_the_targets(models):
    """At T=1 the token of a cycle is drawn from the target's distribution, whatever was drafted and verified."""
    target, head = tiny_models(seed=4, vocab=5, spread=0.3)
    space = Space(2, 3, (0, 1, 2, 4))
    engine = AdaptiveEngine(target, head, Rule(space, costs(space), 1.0), Sampling(1.0))
    torch.manual_seed(0)
    engine.prefill([[1, 2, 3]])
    before = [x.clone() for x in (engine.length, engine.count, engine.emitted, engine.features)]
    drawn = torch.zeros(5)
    for _ in range(600):
        drawn[next(engine.cycles())[0][0]] += 1
        for x, old in zip((engine.length, engine.count, engine.emitted, engine.features), before):
            x.copy_(old)
    with torch.no_grad():
        hidden, *_ = target(torch.tensor([[1, 2, 3, before[2][0, 0].item()]]))
    p = target.logits(hidden[0, -1]).softmax(-1)
    assert ((drawn / 600 - p).abs() < 4 * (p * (1 - p) / 600).sqrt()).all()


def test_rule_at_the_extremes():
    rule = Rule(SPACE, costs(), rate=1.5)
    for level in range(1, SPACE.levels):
        sure, hopeless = torch.ones(1, SPACE.width), torch.zeros(1, SPACE.width)
        sure[:, 0] = hopeless[:, 0] = level / SPACE.levels
        sure[:, 1] = hopeless[:, 1] = 0.1
        assert not rule.stop(sure) and rule.size(sure) == len(SPACE.sizes) - 1
        assert rule.stop(hopeless) and rule.size(hopeless) == 0


def test_oracle_is_the_best_there_is(recording):
    """Against all sequences of decisions on the first places of a text, and against every fixed choice."""
    short = Recording(4, *(x[:4] for x in recording[1:]))
    cost, step = seconds(short, costs()).flatten(1), short.accepted.flatten(1) + 1
    choices = range(cost.shape[1])

    def least(place):
        return 0.0 if place >= 4 else min(cost[place, c].item() + least(place + step[place, c].item()) for c in choices)

    level, size = oracle(short, costs())
    _, _, visited = walk(short, costs(), level, size)
    taken = seconds(short, costs())[torch.arange(4), level, size][visited].sum().item()
    assert taken == pytest.approx(least(0), rel=1e-5)
    fixed, rate = best_fixed(recording, costs(), SPACE)
    every = [replay(recording, costs(), Fixed(SPACE, d, s))[0] for d, s in itertools.product(range(1, 5), range(1, 5))]
    assert rate == max(every) == replay(recording, costs(), fixed)[0]
    assert walk(recording, costs(), *oracle(recording, costs()))[0] >= rate


def test_environments_pay_what_the_replay_counts(recording):
    torch.manual_seed(0)
    rate, R = 1.3, len(recording.seen)
    worth = recording.accepted + 1 - rate * seconds(recording, costs())
    env = Depth(torch.full((R, SPACE.levels), 2), recording, costs(), rate, 50)
    for _ in range(20):
        root = env.root.clone()
        assert torch.equal(env.observation, recording.seen[root, 0])
        reward, over = env.step(torch.zeros(50, dtype=torch.long))                    # one more level ..
        assert not reward.any() and not over.any() and torch.equal(env.root, root)
        reward, over = env.step(torch.ones(50, dtype=torch.long))                     # .. and stop
        assert over.all() and torch.equal(reward, worth[root, 1, 2])
        inside = root // PLACES == (root + recording.accepted[root, 1, 2] + 1) // PLACES
        assert torch.equal(env.root[inside], (root + recording.accepted[root, 1, 2] + 1)[inside])
    env = Size(torch.full((R,), 3), recording, costs(), rate, 50)
    root = env.root.clone()
    assert torch.equal(env.step(torch.full((50,), 4))[0], worth[root, 3, 4])


class TwoArms:
    """The observation says which arm pays."""

    def __init__(self):
        self.observation = torch.eye(2)[torch.randint(2, (64,))]

    def step(self, action):
        reward = (action == self.observation.argmax(1)).float()
        self.observation = torch.eye(2)[torch.randint(2, (64,))]
        return reward, torch.ones(64, dtype=torch.bool)


def test_ppo_learns_two_arms():
    torch.manual_seed(0)
    actor, critic = mlp(2, 32, 2), mlp(2, 32, 1)
    curve = ppo(TwoArms(), actor, critic, 6 * BUFFER, gamma=0.9)
    assert curve[0] < 0.6 and curve[-1] > 0.9
    assert torch.equal(actor(torch.eye(2)).argmax(1), torch.arange(2))


def test_learning_finds_what_can_be_known(recording, monkeypatch):
    """A made-up target accepts everything or nothing, and the draft's probabilities say which."""
    monkeypatch.setattr(ltd, "STEPS", 4 * BUFFER)
    torch.manual_seed(0)
    easy = torch.rand(len(recording.seen)) < 0.5
    kept = torch.tensor([[min(d, SPACE.nodes(d, s)) for s in range(len(SPACE.sizes))] for d in range(1, 5)])
    seen = recording.seen.clone()
    seen[:, :, 2:] = easy[:, None, None].float()
    made_up = recording._replace(seen=seen, accepted=easy[:, None, None] * kept)
    fixed, rate = best_fixed(made_up, costs(), SPACE)
    learned = ltd.learn(made_up, costs(), SPACE, 32, rate, seed=0)
    possible = walk(made_up, costs(), *oracle(made_up, costs()))[0]
    assert replay(made_up, costs(), learned)[0] > rate + 0.5 * (possible - rate)


@torch.no_grad()
def test_costs_are_measured(models):
    found = measure(*models, SPACE, prompts()[:2], until=100)
    assert found.draft.shape == (2, 4) and found.verify.shape == (2, 4, 5)
    assert (found.draft.diff(dim=1) > 0).all() and (found.verify > 0).all()
    assert torch.equal(found.verify[:, 0, 3], found.verify[:, 0, 4]), "a level of 3 candidates cannot keep 5 or 9"


def test_policy_files(tmp_path):
    path, learned, table = tmp_path / "policy.pt", Learned(SPACE, 16), costs()
    seen = torch.rand(7, SPACE.width)
    save_policy(path, learned, table, 1.5, "ltd")
    assert torch.equal(load_policy(path).size(seen), learned.size(seen))
    assert load_policy(path, SPACE.shape).space == SPACE
    with pytest.raises(UserError, match="learned for trees 3,4,9, not 1,5,5"):
        load_policy(path, TreeShape(1, 5, 5))
    save_policy(path, learned, table, 1.5, "rule")
    assert torch.equal(load_policy(path).size(seen), Rule(SPACE, table, 1.5).size(seen))
    wrong = Learned(Space(2, 4, (0, 1, 2, 5)), 16)
    wrong.space = SPACE
    save_policy(path, wrong, table, 1.5, "ltd")
    with pytest.raises(UserError, match="do not fit"):
        load_policy(path)
    with pytest.raises(UserError, match="does not exist"):
        load_policy(tmp_path / "none.pt")
