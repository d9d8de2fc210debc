"""Decode once, replay every decision: what any choice of depth and size would have brought and cost.

At T=0 a text and all draft trees along it are deterministic. So the deepest and largest tree is drafted at *every*
position of the target's greedy continuation, once: a replayed cycle may then start wherever the one before ended.
Together with the costs measured on this machine every decision is replayed exactly, thousands of times a second.
"""
import time
from typing import NamedTuple

import torch

from gto.adaptive import AdaptiveEngine
from gto.engine import Engine
from gto.evaluate import synchronize
from gto.model import KV, Prefix
from gto.policy import Costs, Fixed, Rule, observe
from gto.rollout import read
from gto.tree import expand, first_level, score_temperature


class Recording(NamedTuple):
    """R = texts * places positions, text by text."""
    places: int
    length: torch.Tensor     # [R] tokens before the root
    seen: torch.Tensor       # [R, levels, width] what a policy sees after each level
    accepted: torch.Tensor   # [R, levels, sizes] accepted drafts, had one stopped there and verified so many


def continue_greedily(target, prompts, new_tokens):
    """prompts: lists of equal length -> [texts, length + new_tokens], the target's own continuation."""
    engine = Engine(target, None, batch=len(prompts), capacity=len(prompts[0]) + new_tokens)
    return torch.tensor(engine.complete(prompts, new_tokens), device=engine.device)


@torch.no_grad()
def record(target, head, prompts, places, space, score_temp=None, progress=lambda parts: parts):
    """Record `places` roots of each prompt's greedy continuation, four texts at a time. -> Recording."""
    temperature = score_temp or score_temperature(0.0)
    start, parts = len(prompts[0]), []
    for rows in progress(continue_greedily(target, prompts, places + space.levels).split(4)):
        (B, T), text = rows.shape, read(target, rows)
        slots = torch.arange(T, device=rows.device)
        hidden, k, v = head(head.fuse(text.features), rows.roll(-1, dims=1), slots.expand(B, T))
        sequence = torch.arange(B, device=rows.device).repeat_interleave(places)      # [r]
        length = torch.arange(start, start + places, device=rows.device).repeat(B)    # [r] the root stands at `length`
        prefix = Prefix(KV([k], [v]), length, sequence)
        future = rows[sequence[:, None], length[:, None] + 1 + slots[:space.levels]]  # [r, levels] what the target says
        draft = first_level(head, hidden[sequence, length - 1], space.branch, temperature)
        seen = [observe(draft.scores, length, space)]
        while len(draft.scores) < space.levels:
            draft = expand(head, draft, prefix, temperature)
            seen.append(observe(draft.scores, length, space))
        parts.append((length, torch.stack(seen, 1), accepted_drafts(draft, future, space)))
    return Recording(places, *(torch.cat(part).cpu() for part in zip(*parts)))


def accepted_drafts(draft, future, space):
    """future [R, levels], the target's greedy continuation -> [R, levels, sizes].

    The drafted path that agrees with it is found once. Stopping at level D and verifying V nodes keeps the path's
    nodes of the first D levels that are among the V best; a parent is never ranked behind its child.
    """
    R, device = len(future), future.device
    path, found = torch.zeros(R, dtype=torch.long, device=device), torch.ones(R, dtype=torch.bool, device=device)
    index, score, alive, made = [], [], [], 0
    for level, (scores, tokens, parents) in enumerate(zip(draft.scores, draft.tokens, draft.parents)):
        on_path = (tokens == future[:, level:level + 1]) & (parents == path[:, None])  # [R, n], at most one
        found, place = found & on_path.any(1), on_path.int().argmax(1)
        path = made + place + 1
        index.append(path - 1), alive.append(found), score.append(scores.gather(1, place[:, None]))
        made += scores.shape[1]
    every = torch.cat(draft.scores, 1)                                                # [R, C]
    order = torch.arange(every.shape[1], device=device)
    accepted, made = torch.zeros(R, space.levels, len(space.sizes), dtype=torch.long, device=device), 0
    for stop in range(1, space.levels + 1):
        made += draft.scores[stop - 1].shape[1]
        kept = torch.tensor(space.choices(stop), device=device)
        for level in range(stop):
            ahead = (every[:, :made] > score[level]) | (
                (every[:, :made] == score[level]) & (order[:made] < index[level][:, None]))  # as a stable sort has it
            accepted[:, stop - 1] += alive[level][:, None] & (ahead.sum(1)[:, None] < kept)
    return accepted


def timed_cycle(engine, nodes):
    """One cycle, drafted to the last level. -> seconds from its start to each level's end; of verifying the nodes."""
    def now():
        synchronize(engine.device)
        return time.perf_counter()

    began, ends = now(), []
    root, draft = engine.begin(int(engine.count) + 1)
    ends.append(now() - began)
    while len(draft.scores) < engine.shape.levels:
        draft = engine.deepen(draft)
        ends.append(now() - began)
    drafted = now()
    engine.check(engine.settle(root, draft, nodes))
    return ends, now() - drafted


def measure(target, head, space, prompts, until):
    """Costs on this machine: medians over the cycles that continue the prompts up to a context of `until` tokens."""
    policy = Fixed(space, space.levels, 0)                                            # is never asked
    engine, samples = AdaptiveEngine(target, head, policy, capacity=until + space.levels + 1), []
    counts = [space.choices(level) for level in range(1, space.levels + 1)]
    distinct = sorted({nodes for row in counts for nodes in row})
    with torch.inference_mode():                                                      # as Engine.launch
        for prompt in prompts:
            engine.prefill([prompt])
            while int(engine.length) < until:
                nodes = distinct[len(samples) % len(distinct)]
                samples.append((int(engine.length) // Costs.STEP, nodes, *timed_cycle(engine, nodes)))
    samples = samples[len(distinct):]                                                 # without each size's first: warm-up

    def median(bucket, nodes=None):
        """Of the cycles with this context and size; where there were none, with any context."""
        chosen = [s for s in samples if nodes in (None, s[1])]
        chosen = [s for s in chosen if s[0] == bucket] or chosen
        return torch.tensor([ends if nodes is None else [check] for _, _, ends, check in chosen]).median(0).values

    buckets = range(-(-until // Costs.STEP))
    verify = [{nodes: median(bucket, nodes).item() for nodes in distinct} for bucket in buckets]
    return Costs(torch.stack([median(bucket) for bucket in buckets]),
                 torch.tensor([[[row[nodes] for nodes in sizes] for sizes in counts] for row in verify]))


# Replaying --------------------------------------------------------------------------------------------------------

def seconds(recording, costs):
    """[R, levels, sizes] what a cycle would have taken."""
    bucket = costs.bucket(recording.length)
    return costs.draft[bucket][..., None] + costs.verify[bucket]


def decide(policy, recording):
    """What a policy does at every position: level [R], from 0, and size [R], indices into the recording's tables."""
    R, levels, _ = recording.seen.shape
    stops = torch.stack([policy.stop(recording.seen[:, level]) for level in range(levels - 1)]
                        + [torch.ones(R, dtype=torch.bool, device=recording.seen.device)], dim=1)
    level = stops.int().argmax(1)                                                     # the first yes
    return level, policy.size(recording.seen[torch.arange(R), level])


def walk(recording, costs, level, size):
    """Decode all texts by these decisions [R] each. -> (tokens a second, tau, visited [R] bool)."""
    at = torch.arange(len(level)), level, size
    step, cost = recording.accepted[at] + 1, seconds(recording, costs)[at]            # [R]
    ends = torch.arange(1, len(level) // recording.places + 1) * recording.places     # [texts]
    root, visited = ends - recording.places, torch.zeros_like(level, dtype=torch.bool)
    while len(root):
        visited[root] = True
        root = root + step[root]
        root, ends = root[root < ends], ends[root < ends]
    return (step[visited].sum() / cost[visited].sum()).item(), step[visited].float().mean().item(), visited


def replay(recording, costs, policy):
    """-> (tokens a second, tau)."""
    return walk(recording, costs, *decide(policy, recording))[:2]


def best_fixed(recording, costs, space):
    """Grid search; a tree without nodes is not drafted at all. -> (Fixed, tokens a second)."""
    grid = [Fixed(space, level, size) for level in range(1, space.levels + 1)
            for size, nodes in enumerate(space.sizes) if nodes]
    return max(((policy, replay(recording, costs, policy)[0]) for policy in grid), key=lambda found: found[1])


def fit_rule(recording, costs, space, rate, rounds=4):
    """The rule with the worth of time that is the speed it reaches itself. `rate`: where to start."""
    for _ in range(rounds):
        rule = Rule(space, costs, rate)
        rate = replay(recording, costs, rule)[0]
    return rule


def oracle(recording, costs):
    """The fastest possible decisions if one knew what will be accepted: level, size [R]. By going backwards: the least
    time from here on is the least, over all decisions, of the cycle's time and the least time from where it ends."""
    cost = seconds(recording, costs).flatten(1)                                       # [R, choices]
    texts, sizes = len(cost) // recording.places, recording.accepted.shape[2]
    cost, step = (x.view(texts, recording.places, -1) for x in (cost, recording.accepted.flatten(1) + 1))
    left, choice = torch.zeros(texts, recording.places + 1), torch.zeros(texts, recording.places, dtype=torch.long)
    for place in reversed(range(recording.places)):
        total = cost[:, place] + left.gather(1, (place + step[:, place]).clamp(max=recording.places))
        left[:, place], choice[:, place] = total.min(1)
    choice = choice.flatten()
    return choice // sizes, choice % sizes


class Decisions:
    """Replayed decoding as environments for `ppo`: texts side by side, from random places on. An episode is one cycle.

    Its reward is its tokens minus its time at `rate` tokens a second. If `rate` is the best possible speed, the best
    policy's mean reward is 0 and every other's below: maximising the mean maximises tokens over time. (The paper's
    reward, each cycle's own throughput, weighs a short cycle as much as a long one.) What the next cycle finds hardly
    depends on where it starts: an episode that went on would only add the noise of its luck.
    """

    def __init__(self, recording, costs, rate, count=128):
        self.recording, self.tokens = recording, recording.accepted + 1               # [R, levels, sizes]
        self.reward = self.tokens - rate * seconds(recording, costs)
        self.root = torch.randint(len(self.reward), (count,))

    def move(self, over, level, size):
        """Where `over` [N]: end the cycle, go where the next one starts (after a text's end: anywhere). -> reward [N]"""
        at, places = (self.root, level, size), self.recording.places
        root, anywhere = self.root + self.tokens[at], torch.randint(len(self.reward), self.root.shape)
        root = torch.where(root // places == self.root // places, root, anywhere)
        self.root = torch.where(over, root, self.root)
        return torch.where(over, self.reward[at], 0.0)


class Depth(Decisions):
    """Action 1 stops, 0 drafts one more level. size_of [R, levels]: what would be verified then."""

    def __init__(self, size_of, *arguments):
        super().__init__(*arguments)
        self.size_of, self.level = size_of, torch.zeros_like(self.root)

    @property
    def observation(self):
        return self.recording.seen[self.root, self.level]

    def step(self, action):
        level = self.level + 1 - action
        over = (action == 1) | (level == self.recording.seen.shape[1] - 1)            # after the last level nobody asks
        reward = self.move(over, level, self.size_of[self.root, level])
        self.level = torch.where(over, 0, level)
        return reward, over


class Size(Decisions):
    """The action is the size. level_of [R]: where drafting stops; None: anywhere, evenly."""

    def __init__(self, level_of, *arguments):
        super().__init__(*arguments)
        self.level_of = level_of
        self.draw()

    def draw(self):
        anywhere = torch.randint(self.recording.seen.shape[1], self.root.shape)
        self.level = anywhere if self.level_of is None else self.level_of[self.root]

    @property
    def observation(self):
        return self.recording.seen[self.root, self.level]

    def step(self, action):
        over = torch.ones_like(self.root, dtype=torch.bool)
        reward = self.move(over, self.level, action)
        self.draw()
        return reward, over
