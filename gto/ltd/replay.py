"""Decode once, replay every decision: what any choice of depth and size would have brought and cost.
At T=0 texts and drafts are deterministic: a draft at *every* position says what any policy would decode."""
from statistics import median
from timeit import repeat
from typing import NamedTuple

import torch
from tqdm import tqdm

from gto.evaluate import accepted_path, fixed_text
from gto.model import Prefix
from gto.policy import Fixed, observe
from gto.tree import TreeShape, candidates, expand, first_level, rerank, score_temperature


class Recording(NamedTuple):
    positions: int              # roots in a text; R of them in all texts, text by text
    observation: torch.Tensor   # [R, levels, width] what a policy sees after each level, the first of which is 0
    accepted: torch.Tensor      # [R, levels, sizes] accepted drafts, had one stopped there and verified so many


@torch.no_grad()
def record(target, head, prompts, positions, space, T=0.0):
    """Draft behind the first `positions` tokens of each prompt's continuation at temperature T. -> Recording, on the
    CPU. (What is accepted at T > 0 follows its distribution, see gto/evaluate.py.)"""
    fixed, texts = fixed_text(target, prompts, positions, T, space.depth), []
    hidden, kv = head.read(fixed.text.features, fixed.text.tokens)                    # [texts, T, dim]
    temperature, steps = score_temperature(T), torch.arange(positions, device=hidden.device)
    for text, start in enumerate(tqdm(fixed.start, desc="record", leave=False)):
        rows, length = torch.full_like(steps, text), start + steps                    # [n], [n] tokens before each root
        root, prefix = fixed.text.tokens[rows, length], Prefix(kv, length, rows)
        draft, observation, accepted = first_level(head, hidden[rows, length - 1], space.top_k, temperature), [], []
        for depth in range(1, space.depth + 1):
            draft = expand(head, draft, prefix, temperature) if depth > 1 else draft
            observation.append(observe(draft.scores, length, space))                  # [n, width]
            for nodes in (space.nodes(depth, size) for size in range(len(space.sizes))):
                tree = rerank(root, *candidates(draft), TreeShape(space.top_k, depth, max(nodes, 1)))
                found = accepted_path(tree, fixed.text.tokens[rows], length[:, None])[1]
                accepted.append(found * (nodes > 0))                                  # [n]
        texts.append((torch.stack(observation, dim=1), torch.stack(accepted, dim=1).unflatten(1, (space.depth, -1))))
    return Recording(positions, *(torch.cat(x).cpu() for x in zip(*texts)))


def seconds_by_choice(costs, policy=None):
    """Seconds of a cycle [levels, sizes], a policy's answers included. A size that is not filled costs the same."""
    seconds, depths = torch.tensor(costs.draft[:, None] + costs.verify).float(), torch.arange(1, costs.space.depth + 1)
    if policy is None:
        return seconds
    seen = torch.rand(policy.width)
    with torch.inference_mode():                                                      # as in decoding
        stop, size = (median(repeat(lambda: ask(seen), number=1, repeat=200)) for ask in (policy.stop, policy.size))
    return seconds + (stop * depths + size)[:, None]


class Replayed(NamedTuple):
    tokens: torch.Tensor    # [texts]
    seconds: torch.Tensor   # [texts]
    roots: list             # where cycles begin

    @property
    def rate(self):
        return (self.tokens.sum() / self.seconds.sum()).item()

    @property
    def tau(self):
        return self.tokens.sum().item() / len(self.roots)


def walk(recording, cycle):
    """Decode all texts. cycle(root) -> drafts accepted, seconds. -> Replayed"""
    tokens, seconds = torch.zeros(2, len(recording.accepted) // recording.positions, dtype=torch.double)
    roots = []
    for text in range(len(tokens)):
        root, end = text * recording.positions, (text + 1) * recording.positions
        while root < end:
            roots.append(root)
            accepted, took = cycle(root)
            tokens[text] += accepted + 1
            seconds[text] += took
            root += accepted + 1
    return Replayed(tokens, seconds, roots)


def drive(policy, recording, costs):
    """Decode by a policy that learns as it goes. -> Replayed"""
    def cycle(root):
        accepted, took = 0, costs.verify[0]
        if not policy.waits():
            seen, last = recording.observation[root], costs.space.depth - 1
            level = next(i for i in range(last + 1) if i == last or policy.stop(seen[i]))
            size = int(policy.size(seen[level]))
            accepted, took = recording.accepted[root, level, size].item(), costs.draft[level] + costs.verify[size]
        policy.learn(accepted)
        return accepted, took

    return walk(recording, cycle)


@torch.no_grad()
def decide(policy, recording):
    """What a policy does at every root: the level [R] where it stops, and the size [R], an index."""
    stop = policy.stop(recording.observation)                                         # [R, levels]
    stop[:, -1] = True                                                                # there nobody asks
    level = stop.int().argmax(1)                                                      # the first yes
    return level, policy.size(recording.observation).gather(1, level[:, None]).squeeze(1)


def replay(recording, seconds, level, size):
    """Decode by these decisions [R] each; seconds [levels, sizes] of a cycle. -> Replayed"""
    accepted = recording.accepted[torch.arange(len(level)), level, size].tolist()
    took = seconds[level, size].tolist()
    return walk(recording, lambda root: (accepted[root], took[root]))


def best_fixed(recording, costs, space):
    """Grid search; a tree without nodes is not drafted at all. -> Fixed, tokens a second."""
    grid = [Fixed(space, depth, size) for depth in range(1, space.depth + 1)
            for size, nodes in enumerate(space.sizes) if nodes]
    rates = [replay(recording, costs, *decide(policy, recording)).rate for policy in grid]
    return grid[rates.index(max(rates))], max(rates)


def oracle(recording, costs):
    """The fastest possible decisions if one knew what will be accepted: level, size [R]. By going backwards: the least
    time from here on is the least, over all decisions, of the cycle's time and the least time from where it ends."""
    n, (R, _, sizes) = recording.positions, recording.accepted.shape
    step = recording.accepted.view(R // n, n, -1) + 1                                 # [texts, n, choices]
    left, choice = torch.zeros(R // n, n + 1), torch.zeros(R // n, n, dtype=torch.long)
    for root in reversed(range(n)):
        total = costs.flatten() + left.gather(1, (root + step[:, root]).clamp(max=n))
        left[:, root], choice[:, root] = total.min(1)
    return choice.flatten() // sizes, choice.flatten() % sizes
