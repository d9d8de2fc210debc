"""The engine with a policy: a cycle's depth and size are decided while it is drafted.

The policy runs on the host, which has to wait for its answer anyway. Every step between two questions (extend, a head
pass at a given level, re-rank and verify at a given size) has a fixed shape: on a GPU it is a CUDA graph.
"""
from functools import partial

import torch

from gto.engine import Engine
from gto.model import Prefix
from gto.policy import observe
from gto.tree import TreeShape, candidates, expand, first_level, rerank


class AdaptiveEngine(Engine):
    """One sequence; its trees have `policy.space.branch` children. `decisions` lists (levels, nodes, observation)."""

    def __init__(self, target, head, policy, sampling=None, capacity=None, score_temp=None):
        super().__init__(target, head, policy.space.shape, sampling, 1, capacity, score_temp)
        self.policy, self.decisions = policy, []

    def whole(self, key, run):
        """What a cycle does depends on what it finds: only its steps are graphs."""
        return run()

    @torch.inference_mode()
    def prefill(self, prompts):
        if self.graphs == {}:                                      # whatever may be decided, before any clock runs
            super().prefill(prompts)
            self.record()
        return super().prefill(prompts)

    def record(self):
        """Capture the graphs of all steps, on a GPU. Leaves the state somewhere: prefill again."""
        space, (root, draft) = self.policy.space, self.begin()
        for level in range(1, space.levels + 1):
            draft = self.deepen(draft) if level > 1 else draft
            self.observe(draft)
            for nodes in sorted(set(space.choices(level))):
                self.check(self.settle(root, draft, nodes))

    def draft(self, width=None):
        space, (root, draft) = self.policy.space, self.begin(width)
        seen = self.observe(draft)
        while len(draft.scores) < space.levels and not self.policy.stop(seen):
            draft = self.deepen(draft)
            seen = self.observe(draft)
        nodes = space.nodes(len(draft.scores), int(self.policy.size(seen)))
        self.decisions.append((len(draft.scores), nodes, seen))
        return self.settle(root, draft, nodes)

    def begin(self, width=None):
        """-> the root [1], a Draft of one level. width: see `extend`."""
        def run():
            hidden, root, _ = self.extend(width if self.graphs is None else None)
            return root, first_level(self.head, hidden, self.shape.branch, self.score_temp)
        return self.step("begin", run)

    def observe(self, draft):
        """What the policy sees, on the host."""
        run = partial(observe, draft.scores, self.length, self.policy.space)
        return self.step(("observe", len(draft.scores)), run).cpu()

    def deepen(self, draft):
        """-> a Draft of one more level."""
        prefix = Prefix(self.head_cache, self.length)
        return self.step(("deepen", len(draft.scores)), partial(expand, self.head, draft, prefix, self.score_temp))

    def settle(self, root, draft, nodes):
        """The best `nodes` nodes of a draft; none: only the root, a step of plain decoding. -> Tree."""
        levels = len(draft.scores)
        self.width = min(levels, nodes) + 1                        # no more can be accepted: the less is to be copied
        self.settled = levels, nodes
        if not nodes:
            return self.root_tree._replace(tokens=root[:, None])
        shape = TreeShape(self.shape.branch, levels, nodes)
        return self.step(("settle", *self.settled), lambda: rerank(root, *candidates(draft), shape))

    def check(self, tree):
        self.step(("check", *self.settled), partial(super().check, tree))
