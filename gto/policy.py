"""The decoding policy: how deep to draft and how many nodes to verify, or neither, decided anew in every cycle. `Rule`
weighs what a cycle's parts cost on this machine against what the head's probabilities promise; gto/ltd learns a policy.
The output stays the target's: verification is lossless whatever the tree, as no decision depends on the draws."""
import itertools
import json
import platform
from bisect import bisect_left
from dataclasses import dataclass
from functools import partial
from math import exp
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from gto.engine import Engine
from gto.model import Prefix
from gto.tree import TreeShape, expand
from gto.util import synchronize, write_whole


@dataclass(frozen=True)
class Space:
    """What there is to choose from: drafts of 1 to `depth` levels, `top_k` children a node, cut to one of `sizes`."""
    top_k: int
    depth: int
    sizes: tuple     # drafted nodes to verify, ascending; 0: only the root. Each is a fixed shape, fit for a CUDA graph
    every: int = 1   # levels from question to question, of which `depth` is a multiple: a GPU has to wait for an answer

    def nodes(self, depth, size):
        """Nodes kept of a draft of `depth` levels when size number `size` is chosen: never more than were drafted."""
        return min(self.sizes[size], self.top_k + (depth - 1) * self.top_k ** 2)


# On a CPU small trees win, or none: one token alone is much cheaper than two. On a GPU dozens of nodes cost little.
SPACES = {"cpu": Space(4, 8, (0, 1, 2, 3, 4, 6, 8, 12, 16, 24)), "cuda": Space(10, 8, (0, 8, 16, 32, 48, 64), every=2)}
FIRST = 6    # columns of an observation before its probabilities, see `observe`


def observe(known, draft, space):
    """What a policy sees of B drafts, B lists of floats: levels drafted / depth; what is known before the draft; the
    probabilities of the newest level's top_k best nodes (the frontier), descending; of the best nodes of all levels,
    descending, 0 where there are none. (Plain Python: for one draft a dozen calls of numpy take three times as long.)
    known: B times tokens in the target's cache, in thousands; the temperature; the target's probability of the root;
    the two of `Echo.read`, the second being a token, of which one sees the head's probability. draft: or None."""
    top_k, most = space.top_k, space.sizes[-1]
    if draft is None:
        return [[0.0, *each[:4], *[0.0] * (1 + top_k + most)] for each in known]
    levels, newest, seen = len(draft.scores) / space.depth, draft.scores[-1].shape[1], []
    for each, scores, tokens in zip(known, torch.cat(draft.scores, dim=1).tolist(), draft.tokens[0].tolist()):
        echoed = sum(exp(score) for score, token in zip(scores, tokens) if token == each[4])
        frontier, best = (sorted(some, reverse=True) for some in (scores[-newest:], scores))
        seen.append([levels, *each[:4], echoed, *map(exp, frontier[:top_k]), *map(exp, best[:most]),
                     *[0.0] * (most - len(best))])
    return seen


class Echo:
    """Text repeats itself: where did its last two tokens stand before, and what came next?"""

    def __init__(self):
        self.text, self.behind = [], {}          # (token, token) -> where in the text the next one is

    def read(self, tokens):
        """More text. -> how many last tokens were the same, up to 8, as a share of 8; what came next, -1: nothing."""
        for token in tokens:
            self.text.append(token)
            pair = tuple(self.text[-2:])
            at, self.behind[pair] = self.behind.get(pair, 0), len(self.text)
        same = next(n for n in range(9) if n in (8, at) or self.text[at - 1 - n] != self.text[-1 - n])
        return same / 8, self.text[at] if at else -1


class Costs(NamedTuple):
    """Seconds of a cycle's parts: draft[levels] + verify[size] (+ look[levels] by a policy), or plain, verify[0]."""
    space: Space
    draft: np.ndarray     # [depth + 1] to draft 0, 1, 2, .. levels
    verify: np.ndarray    # [sizes]
    look: np.ndarray      # [depth + 1] to look, and decide, before the draft and at each level so far


class Fixed:
    """The same depth and size in every cycle; depth 0: plain decoding. Policies answer two questions of an observation:
    draft no further, or not at all? how many nodes to verify, as an index into `space.sizes`? (All but `Rule` also of
    tensors of them, [.., width] -> [..].) And are told how many drafts a cycle accepted."""

    def __init__(self, space, depth, size):
        self.space, self.depth, self.choice = space, depth, size

    def stop(self, seen):
        return (torch.as_tensor(seen)[..., 0] * self.space.depth).round() >= self.depth

    def size(self, seen):
        return torch.full(torch.as_tensor(seen).shape[:-1], self.choice)

    def learn(self, accepted):
        pass


class Rule:
    """Draft on while the next level promises more accepted tokens than it costs, its time counted in tokens at the
    speed of decoding so far; then verify the size that promises most beyond its cost. A promise is the head's
    probability times trust, what came true of earlier ones. Needs no training.
    Roots are of five kinds, by how sure the target was of them: where it was, it will be. While cycles with drafts
    behind roots of a kind are slower than plain decoding, each doubles the plain ones before the kind's next."""
    memory, longest_wait = 0.98, 64      # of a cycle ago, in trust and speed; cycles
    borders = 0.05, 0.2, 0.5, 0.8        # of the kinds: the target's probability of the root

    def __init__(self, costs):
        self.space, self.draft, self.verify = costs.space, (costs.draft + costs.look).tolist(), costs.verify.tolist()
        self.node = (self.verify[-1] - self.verify[0]) / self.space.sizes[-1]
        self.accepted, self.promised = 2.0, 2.0                                      # their quotient is the trust
        self.speed = [[20 * tokens, 20 * self.verify[0]] for tokens in (1, 1.1, 1.2, 1.3, 1.4, 1)]   # tokens, seconds
        self.wait, self.patience, self.cycle = [0] * 5, [1] * 5, None                # by kind, as speed but its last

    def rate(self):
        """Tokens a second that time is worth: what drafting makes of it, or plain decoding would."""
        return max(self.speed[-1][0] / self.speed[-1][1], 1 / self.verify[0])

    def stop(self, seen):
        drafted = round(seen[0] * self.space.depth)
        if drafted == 0:
            self.cycle, self.kind = None, bisect_left(self.borders, seen[3])
            waits = self.wait[self.kind] > 0
            self.wait[self.kind] -= waits
            return waits
        # A path of probability p lost a factor of p^(1/level) a level. The next level's promise lies between that of
        # the frontier's best node and that of all its nodes; it must be trusted twice, as it stands on this level's.
        every, best, frontier = self.space.every, seen[FIRST], sum(seen[FIRST:FIRST + self.space.top_k])
        powers = [1 + level / drafted for level in range(1, every + 1)]
        promised = sum(best ** power + frontier ** power for power in powers) / 2
        seconds = self.draft[drafted + every] - self.draft[drafted] + 2 * every * self.node     # two nodes a level
        return (self.accepted / self.promised) ** 2 * promised < seconds * self.rate()

    def size(self, seen):
        promised, sizes = [0.0, *itertools.accumulate(seen[FIRST + self.space.top_k:])], self.space.sizes
        trust, rate = self.accepted / self.promised, self.rate()
        worth = [trust * promised[nodes] - seconds * rate for nodes, seconds in zip(sizes, self.verify)]
        size = worth.index(max(worth))
        self.cycle = promised[sizes[size]], self.draft[round(seen[0] * self.space.depth)] + self.verify[size]
        return size

    def learn(self, accepted):
        if self.cycle is None:                                                        # it waited
            return
        (promised, seconds), kind, memory = self.cycle, self.kind, self.memory
        self.accepted = (1 - memory) * 2 + memory * self.accepted + accepted
        self.promised = (1 - memory) * 2 + memory * self.promised + promised
        for each in kind, -1:
            tokens, took = self.speed[each]
            self.speed[each] = [memory * tokens + accepted + 1, memory * took + seconds]
        slow = self.speed[kind][0] * self.verify[0] < self.speed[kind][1]
        self.wait[kind] = self.patience[kind] if slow else 0
        self.patience[kind] = min(2 * self.patience[kind], self.longest_wait) if slow else 1


class AdaptiveEngine(Engine):
    """Decodes one sequence by a policy. Every part of a cycle between two questions has fixed shapes: on a GPU each is
    one CUDA graph."""
    queue_ahead = False    # what a cycle does depends on what it finds

    def __init__(self, target, head, policy, sampling=None, capacity=None):
        largest = TreeShape(policy.space.top_k, policy.space.depth, policy.space.sizes[-1])
        super().__init__(target, head, largest, sampling, capacity=capacity)
        self.policy, self.decided, self.unread = policy, False, []  # has a cycle been? slots the head has not read
        self.echo, self.certainty = Echo(), torch.ones(1, device=self.device)         # the target's, of the root
        if self.device.type == "cuda":
            self.capture_graphs()

    def prefill(self, prompts):
        self.tell()
        self.decided, self.unread, self.echo = False, [], Echo()
        first = super().prefill(prompts)
        self.echo.read(prompts[0])
        return first

    def accept(self, logits, tree, width, positions):
        path, num_accepted, emitted = super().accept(logits, tree, width, positions)
        p = logits[0, path[0, num_accepted]].float().softmax(-1)                      # [1, V]
        self.certainty.copy_(p[0, emitted[0, num_accepted]])
        return path, num_accepted, emitted

    def tell(self):
        """Tell the policy what became of its last decision."""
        if self.decided:
            self.policy.learn(int(self.num_accepted))

    def step(self):
        _, draft, nodes = self.draft_levels()
        key = ("verify", len(draft.scores), nodes) if draft else "plain"
        self.run(key, lambda: self.verify(self.tree(self.root(), draft, nodes)))

    def draft_levels(self, width=None):
        """As the policy decides; without a Draft if it decides for plain decoding right away."""
        self.tell()
        self.decided, new = True, int(self.num_accepted) + 1
        known = [int(self.length) / 1000, self.sampling.temperature, float(self.certainty),
                 *self.echo.read(self.emitted[0, :new].tolist())]
        if self.look(0, known, None)[1]:
            self.unread.append((self.features[:, :new].clone(), self.emitted[:, :new].clone()))
            return self.root(), None, 0
        if self.unread:
            features, tokens = (torch.cat(x, dim=1) for x in zip(*self.unread))
            self.read(features, tokens, self.length - new - tokens.shape[1])
            self.unread = []
        space, prefix = self.policy.space, Prefix(self.head_cache, self.length)
        root, draft = self.run(("draft", 1), lambda: self.begin(
            int(self.num_accepted) + 1 if self.device.type == "cpu" else None))
        for depth in range(1, space.depth + 1):
            if depth % space.every == 0:
                seen, stops = self.look(depth, known, draft)
                if stops:
                    break
            draft = self.run(("draft", depth + 1), partial(expand, self.head, draft, prefix, self.score_temp))
        return root, draft, space.nodes(depth, int(self.policy.size(seen)))

    def look(self, depth, known, draft):
        """-> what there is to see; does the policy stop here?"""
        seen = observe([known], draft, self.policy.space)[0]
        return seen, depth == self.policy.space.depth or bool(self.policy.stop(seen))

    @torch.inference_mode()
    def capture_graphs(self):
        """Take every decision once, before any clock runs: on no text, for the prefill comes after."""
        policy, space = self.policy, self.policy.space
        for depth, size in itertools.product(range(space.every, space.depth + 1, space.every), range(len(space.sizes))):
            self.length.fill_(1)                                   # a root has a token before it
            self.num_accepted.zero_()
            self.policy = Fixed(space, depth, size)
            self.step()
        self.policy, self.decided = policy, False


@torch.inference_mode()
def measure(target, head, space, rounds=24, context=128):
    """What the parts of a cycle take here, behind `context` tokens: quartiles over rounds of all sizes. -> Costs."""
    engine, times = AdaptiveEngine(target, head, Fixed(space, space.depth, 0), capacity=context + space.depth + 1), {}

    def timed(call):
        def clocked(key, *arguments):
            began = synchronize(engine.device)
            result = call(key, *arguments)
            times.setdefault(key, []).append(synchronize(engine.device) - began)
            return result
        return clocked

    engine.run, engine.look = timed(engine.run), timed(engine.look)
    levels = range(1, space.depth + 1)
    filled = [next(depth for depth in levels[space.every - 1::space.every] if space.nodes(depth, size) == nodes)
              for size, nodes in enumerate(space.sizes)]                              # levels that a size needs
    for _ in range(rounds):
        for depth, size in [(space.depth, 0), *zip(filled, range(len(filled)))]:
            engine.policy = Fixed(space, depth, size)
            engine.length.fill_(context)
            engine.num_accepted.fill_(1)
            engine.step()
    took = {key: np.quantile(seconds, 0.25) for key, seconds in times.items()}        # as undisturbed as most are
    drafted = np.cumsum([took["draft", depth] for depth in levels])
    draft = np.append(0, np.polyval(np.polyfit(levels, drafted, 1), levels))          # each level costs the same,
    verify = [took["verify", *each] for each in zip(filled, space.sizes)]             # and a larger size no less
    look = np.cumsum([took.get(depth, 0) for depth in (0, *levels)])
    return Costs(space, draft, (np.maximum.accumulate(verify) + np.minimum.accumulate(verify[::-1])[::-1]) / 2, look)


def costs_here(folder, target, head, space=None):
    """Costs, from costs.json in this folder if they were measured on this machine, else in seconds, and kept there."""
    weight, path = target.norm.weight, Path(folder, "costs.json")
    space = space or SPACES[weight.device.type]
    name = torch.cuda.get_device_name(weight.device) if weight.is_cuda else f"{platform.node()} {platform.machine()}"
    about = str((name, torch.get_num_threads(), torch.__version__, weight.dtype, space, target.config, head.config))
    try:
        kept = json.loads(path.read_text())
        if kept["about"] == about:
            return Costs(space, *(np.array(kept[part], dtype=float) for part in Costs._fields[1:]))
    except (OSError, ValueError, LookupError, TypeError):
        pass                                                                          # there is none, or it is damaged
    costs = measure(target, head, space)
    parts = {part: getattr(costs, part).tolist() for part in Costs._fields[1:]}
    write_whole(path, json.dumps({"about": about, **parts}))
    return costs


def policy_path(head_path):
    """Where python -m gto.ltd leaves the policy for a head."""
    return Path(head_path).with_name(f"policy-{Path(head_path).name}")


def make_engine(target, head, way, head_path, out, sampling, capacity):
    """way: a TreeShape for every cycle, or the policy "rule" or "ltd"; None: the learned policy of this head if gto.ltd
    has found it faster than the rule, else the rule. Without a head, plain decoding."""
    if head is None or isinstance(way, TreeShape):
        return Engine(target, head, way, sampling, capacity=capacity)
    if way == "ltd" or not way and policy_path(head_path).exists():
        from gto.ltd.ppo import load_policy
        learned, gain = load_policy(policy_path(head_path))
        if way or gain > 0:
            return AdaptiveEngine(target, head, learned, sampling, capacity)
    return AdaptiveEngine(target, head, Rule(costs_here(out, target, head)), sampling, capacity)
