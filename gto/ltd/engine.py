"""The engine with a policy: a cycle's depth and size are decided while it is drafted. The host asks; every part of a
cycle between two questions has fixed shapes: on a GPU each is one CUDA graph."""
import itertools
from functools import partial

import torch

from gto.engine import Engine
from gto.ltd.policy import Fixed, observe
from gto.model import Prefix
from gto.tree import TreeShape, candidates, expand, first_level, rerank


class AdaptiveEngine(Engine):
    """Decodes one sequence. policy: one of gto.ltd.policy; its space says which trees there are."""
    queue_ahead = False    # what a cycle does depends on what it finds

    def __init__(self, target, head, policy, sampling=None, capacity=None):
        super().__init__(target, head, policy.space.shape, sampling, capacity=capacity)
        if self.device.type == "cuda":
            self.capture_graphs(policy.space)
        self.policy = policy

    def step(self):
        policy, space, prefix = self.policy, self.policy.space, Prefix(self.head_cache, self.length)
        root, draft = self.run(("draft", 1), self.begin)
        for depth in range(1, space.depth + 1):
            observation = self.run(("observe", depth), partial(observe, draft.scores, self.length, space)).cpu()
            if depth == space.depth or policy.stop(observation):
                break
            draft = self.run(("draft", depth + 1), partial(expand, self.head, draft, prefix, self.score_temp))
        nodes = space.nodes(depth, int(policy.size(observation)))
        self.run(("verify", depth, nodes), partial(self.rerank_and_verify, root, draft, nodes))

    def begin(self):
        """-> the root [1], a Draft of one level."""
        width = int(self.num_accepted) + 1 if self.device.type == "cpu" else None     # see Engine.step
        hidden, root, _ = self.extend(width)
        return root, first_level(self.head, hidden, self.shape.top_k, self.score_temp)

    def rerank_and_verify(self, root, draft, nodes):
        """Verify the best `nodes` nodes of a draft; 0: only the root, a step of plain decoding."""
        tree = self.root_tree._replace(tokens=root[:, None])
        if nodes:
            tree = rerank(root, *candidates(draft), TreeShape(self.shape.top_k, len(draft.scores), nodes))
        self.verify(tree)

    @torch.inference_mode()
    def capture_graphs(self, space):
        """Take every decision once, before any clock runs: on no text, for the prefill comes after."""
        self.length.fill_(1)                                       # a root has a token before it
        for depth, size in itertools.product(range(1, space.depth + 1), range(len(space.sizes))):
            self.policy = Fixed(space, depth, size)
            self.step()
