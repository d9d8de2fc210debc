"""Decode once, replay every decision: what any choice of depth and size would have brought and cost.
At T=0 texts and drafts are deterministic: a draft at *every* position says what any policy would decode."""
from typing import NamedTuple

import torch
from torch.nn import functional as F
from tqdm import tqdm

from gto.evaluate import fixed_text
from gto.model import Prefix
from gto.policy import Echo, Fixed, observe
from gto.tree import expand, first_level, score_temperature


class Recording(NamedTuple):
    positions: int              # roots in a text; R of them in all texts, text by text
    observation: torch.Tensor   # [R, levels, width] what there is to see before the draft and after each level of it
    accepted: torch.Tensor      # [R, levels, sizes] accepted drafts, had one stopped there and verified so many


@torch.no_grad()
def record(target, head, prompts, positions, space, T=0.0):
    """Draft behind the first `positions` tokens of each prompt's continuation at temperature T. -> Recording, on the
    CPU. (What is accepted at T > 0 follows its distribution, see gto/evaluate.py.)"""
    fixed, texts = fixed_text(target, prompts, positions, T, space.depth), []
    hidden, kv = head.read(fixed.text.features, fixed.text.tokens)                    # [texts, T, dim]
    temperature, steps = score_temperature(T), torch.arange(positions, device=hidden.device)
    for text, start in enumerate(tqdm(fixed.start, desc="record", leave=False)):
        rows, length, tokens = torch.full_like(steps, text), start + steps, fixed.text.tokens[text]    # [n], [n], [T]
        known, prefix = what_is_known(target, fixed.text.hidden[text], tokens, length, T), Prefix(kv, length, rows)
        draft = first_level(head, hidden[rows, length - 1], space.top_k, temperature)
        path, on_path = torch.full_like(steps, -1), []    # [n] the candidate that the text's path has come to
        observation = [torch.tensor(observe(known, None, space))]
        accepted = [torch.zeros(positions, len(space.sizes)).long()]
        for depth in range(1, space.depth + 1):
            draft = expand(head, draft, prefix, temperature) if depth > 1 else draft
            hit = (draft.parents[-1] == path[:, None] + 1) & (draft.tokens[-1] == tokens[length + depth][:, None])
            path = torch.where(hit.any(1), sum(h.shape[1] for h in on_path) + hit.byte().argmax(1), -2)
            on_path.append(hit)                                                       # [n, nodes of the level]
            order = torch.cat(draft.scores, dim=1).sort(dim=1, descending=True, stable=True).indices   # see `rerank`
            found = F.pad(torch.cat(on_path, dim=1).gather(1, order).cumsum(1), (1, 0))   # among the best 0, 1, 2, ..
            observation.append(torch.tensor(observe(known, draft, space)))            # [n, width]
            accepted.append(found[:, [space.nodes(depth, size) for size in range(len(space.sizes))]].cpu())
        texts.append((torch.stack(observation, dim=1), torch.stack(accepted, dim=1)))
    return Recording(positions, *map(torch.cat, zip(*texts)))


def what_is_known(target, hidden, tokens, length, T):
    """`known` of `observe` at the roots of a text: hidden [T, dim], tokens [T], length [n] tokens before each root."""
    roots, echo = tokens[length], Echo()
    certainty = target.logits(hidden[length - 1]).float().softmax(-1).gather(1, roots[:, None])        # [n, 1]
    echo.read(tokens[:length[0]].tolist())
    return [[before / 1000, T, sure, *echo.read([root])]
            for before, sure, root in zip(length.tolist(), certainty[:, 0].tolist(), roots.tolist())]


def seconds_by_choice(costs, policy=None):
    """Seconds of a cycle [levels, sizes] by a policy; None or Fixed: one that need not look. A size that is not filled
    costs the same."""
    seconds = torch.tensor(costs.draft[:, None] + costs.verify).float()
    seconds[0] = costs.verify[0]                                                      # plain decoding, of whatever size
    return seconds if type(policy) in (type(None), Fixed) else seconds + torch.tensor(costs.look).float()[:, None]


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


@torch.no_grad()
def drive(policy, recording, costs):
    """Decode by a policy that learns as it goes. -> Replayed"""
    seconds, asked = seconds_by_choice(costs, policy).tolist(), range(0, costs.space.depth + 1, costs.space.every)

    def cycle(root):
        seen = recording.observation[root].tolist()
        level = next(i for i in asked if i == asked[-1] or policy.stop(seen[i]))
        size = int(policy.size(seen[level])) if level else 0
        accepted = int(recording.accepted[root, level, size])
        policy.learn(accepted)
        return accepted, seconds[level][size]

    return walk(recording, cycle)


@torch.no_grad()
def decide(policy, recording):
    """What a policy does at every root: the level [R] where it stops, and the size [R], an index."""
    stop = policy.stop(recording.observation[:, ::policy.space.every])                # [R, asked]
    stop[:, -1] = True                                                                # there nobody asks
    level = stop.int().argmax(1) * policy.space.every                                 # the first yes
    return level, policy.size(recording.observation[torch.arange(len(level)), level])


def replay(recording, seconds, level, size):
    """Decode by these decisions [R] each; seconds [levels, sizes] of a cycle. -> Replayed"""
    accepted = recording.accepted[torch.arange(len(level)), level, size].tolist()
    took = seconds[level, size].tolist()
    return walk(recording, lambda root: (accepted[root], took[root]))


def best_fixed(recording, seconds, space):
    """Grid search over all depths and sizes; a tree without nodes is not drafted at all. -> depth, nodes, Replayed."""
    grid = torch.cartesian_prod(torch.arange(1, space.depth + 1), torch.arange(1, len(space.sizes)))
    found = [replay(recording, seconds, *each.expand(len(recording.accepted), 2).T) for each in grid]
    (depth, size), best = max(zip(grid.tolist(), found), key=lambda each: each[1].rate)
    return depth, space.nodes(depth, size), best


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
