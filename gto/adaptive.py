"""The engine with a policy: a cycle's depth and size are decided while it is drafted.

The policy runs on the host, which has to wait for its answer anyway. Every step between two questions (extend, a head
pass at a given level, re-rank and verify at a given size) has a fixed shape.
"""
from gto.engine import Engine
from gto.policy import observe
from gto.tree import TreeShape, candidates, expand, first_level, rerank


def trim(engine, draft, root, nodes):
    """The best `nodes` nodes of a draft; none: only the root, a step of plain decoding. -> Tree."""
    if not nodes:
        return engine.root_tree._replace(tokens=root[:, None])
    shape = TreeShape(draft.scores[0].shape[1], len(draft.scores), nodes)
    return rerank(root, *candidates(draft), shape)


class AdaptiveEngine(Engine):
    """One sequence; its trees have `policy.space.branch` children. `decisions` lists (levels, nodes, observation)."""

    fixed = False  # what a cycle does depends on what it finds

    def __init__(self, target, head, policy, sampling=None, capacity=None, score_temp=None):
        super().__init__(target, head, policy.space.shape, sampling, 1, capacity, score_temp)
        self.policy, self.decisions = policy, []

    def draft(self, width=None):
        space, (hidden, root, prefix) = self.policy.space, self.extend(width)
        draft = first_level(self.head, hidden, space.branch, self.score_temp)
        seen = observe(draft.scores, self.length, space).cpu()
        while len(draft.scores) < space.levels and not self.policy.stop(seen):
            draft = expand(self.head, draft, prefix, self.score_temp)
            seen = observe(draft.scores, self.length, space).cpu()
        nodes = space.nodes(len(draft.scores), int(self.policy.size(seen)))
        self.decisions.append((len(draft.scores), nodes, seen))
        self.width = min(len(draft.scores), nodes) + 1             # no more can be accepted: the less is to be copied
        return trim(self, draft, root, nodes)
