"""The decoding engine: prefill, then draft, verify, compact, repeat. Without a head it is plain decoding.
Every tensor of a cycle has a fixed shape and every length lives on the device, so that on a GPU one cycle is one
CUDA graph; the host only reads what was emitted."""
import itertools

import torch

from gto.model import KVCache, Prefix
from gto.tree import Tree, TreeShape, candidates, expand, first_level, rerank, rows, score_temperature
from gto.util import UserError
from gto.verify import Sampling, verify
from kernels.graphs import Graphs


class Engine:
    """Decodes `batch` sequences side by side, of at most `capacity` tokens, prompt and output together. head None:
    plain decoding, the same cycle with a tree of only the root. score_temp: of the tree's scores, see gto/tree.py."""
    queue_ahead = True    # on a GPU, queue the next cycle before this one's tokens are read

    def __init__(self, target, head, shape=None, sampling=None, batch=1, capacity=None, score_temp=None):
        self.target, self.head, self.shape = target, head, shape or TreeShape()
        if head is not None and self.shape.top_k > len(head.token_ids):
            raise UserError(f"--tree {self.shape}: the head knows only {len(head.token_ids)} tokens to choose from")
        self.sampling, self.batch = sampling or Sampling(), batch
        self.capacity = capacity or target.config.max_len
        self.score_temp = score_temp or score_temperature(self.sampling.temperature)
        self.width = self.shape.depth + 1 if head is not None else 1                  # P: most tokens a cycle emits
        self.device = target.norm.weight.device
        self.target_cache = KVCache(target, batch, self.capacity + self.width)
        self.head_cache = KVCache(head, batch, self.capacity + self.width) if head is not None else None

        def zeros(*shape, dtype=torch.long):
            return torch.zeros(batch, *shape, dtype=dtype, device=self.device)

        # The state a cycle reads and overwrites in place. `length` counts what the target has cached: everything
        # but the root. `features` and `emitted` are the head's next slots: the last cycle's accepted path.
        self.length, self.num_accepted, self.emitted = zeros(), zeros(), zeros(self.width)
        self.features = zeros(self.width, 3 * target.config.dim, dtype=target.norm.weight.dtype)
        self.uniform = torch.zeros(batch, self.capacity, device=self.device)          # for the token behind a position
        self.root_tree = Tree(zeros(1), zeros(1), zeros(1, 1, dtype=torch.bool) | True, zeros(1), zeros(1))
        self.run = Graphs(self.device, (self.length, self.num_accepted, self.emitted, self.features))

    @torch.inference_mode()
    def prefill(self, prompts):
        """prompts: B lists of token ids. Fills both caches and returns the first token of each sequence, [B]."""
        for prompt in prompts:
            if not prompt:
                raise UserError("empty prompt: give some text to continue")
            if len(prompt) >= self.capacity:
                raise UserError(f"the prompt has {len(prompt)} tokens, the context holds {self.capacity}: shorten it")
            if max(prompt) >= self.target.config.vocab_size:
                raise UserError(f"the target knows no token {max(prompt)}: --tokenizer must name its own")
        tokens = torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, prompts)), batch_first=True).to(self.device)
        self.length.copy_(torch.tensor([len(p) for p in prompts]))
        hidden, features, keys, values = self.target(tokens)                          # causal: padding is never seen
        start = torch.zeros_like(self.length)
        self.target_cache.commit(keys, values, start)
        last = (self.length - 1)[:, None]                                             # [B, 1]
        logits = self.target.logits(rows(hidden, last))                               # [B, 1, V]
        self.uniform.uniform_()
        _, _, self.emitted[:, :1] = self.accept(logits, self.root_tree, 1, last)
        self.num_accepted.zero_()
        if self.head is not None:
            # The last slot is left to the first cycle, which overwrites it: its next token is the root.
            _, (keys, values) = self.head.read(features, tokens)
            self.head_cache.commit(keys, values, start)
            self.features[:, :1] = rows(features, last)
        return self.emitted[:, 0].tolist()

    def begin(self, width=None):
        """Extend the head over the newly committed tokens, which end with the root: `width` slots, None: all.
        -> the root [B], a Draft of one level."""
        # Slots in the head's cache, [B]; it would be below 0 behind the end of a sequence that waits for others.
        committed = (self.length - self.num_accepted - 1).clamp(min=0)
        hidden = self.read(self.features[:, :width], self.emitted[:, :width], committed)
        hidden = rows(hidden, self.num_accepted[:, None])[:, 0]                       # [B, dim] at the root
        return self.root(), first_level(self.head, hidden, self.shape.top_k, self.score_temp)

    def read(self, features, tokens, committed):
        """The head behind its first `committed` [B] slots: features [B, P, 3 * dim], tokens [B, P] -> [B, P, dim]."""
        B, P = tokens.shape
        steps = torch.arange(P, device=self.device)
        causal = (steps <= steps[:, None]).expand(B, P, P)
        hidden, keys, values = self.head(self.head.fuse(features), tokens, committed[:, None] + steps, causal,
                                         Prefix(self.head_cache, committed))
        self.head_cache.commit([keys], [values], committed)
        return hidden

    def root(self):
        """The last committed token, [B]: the only one that the target has not read."""
        return self.emitted.gather(1, self.num_accepted[:, None])[:, 0]

    def draft_levels(self, width=None):
        """Draft behind the root. -> root [B]; a Draft, None in plain decoding; how many of its nodes to verify."""
        if self.head is None:
            return self.root(), None, 0
        root, draft = self.begin(width)
        for _ in range(self.shape.depth - 1):
            draft = expand(self.head, draft, Prefix(self.head_cache, self.length), self.score_temp)
        return root, draft, self.shape.nodes

    def tree(self, root, draft, nodes):
        """The best `nodes` nodes of a draft behind its root, as a Tree. 0: only the root."""
        if nodes == 0:
            return self.root_tree._replace(tokens=root[:, None])
        return rerank(root, *candidates(draft), TreeShape(self.shape.top_k, len(draft.scores), nodes))

    def draft(self, width=None):
        """-> a Tree behind the last committed token."""
        return self.tree(*self.draft_levels(width))

    def verify(self, tree):
        """One target forward over the tree; commits the accepted path and updates the state."""
        positions, width = self.length[:, None] + tree.depth, min(self.width, tree.depth.shape[1])    # [B, N]; P
        hidden, features, keys, values = self.target(tree.tokens, positions, tree.mask,
                                                     Prefix(self.target_cache, self.length))
        path, num_accepted, emitted = self.accept(self.target.logits(hidden), tree, width, positions)
        self.target_cache.commit(keys, values, self.length, path)
        self.features[:, :width] = rows(features, path)
        self.emitted[:, :width] = emitted
        self.num_accepted.copy_(num_accepted)
        self.length.add_(num_accepted + 1).clamp_(max=self.capacity)   # what waits for others stays in the cache

    def accept(self, logits, tree, width, positions):
        """See `gto.verify.verify`; positions [B, N] of the nodes."""
        uniform = self.uniform.gather(1, positions.clamp(max=self.capacity - 1)) if self.sampling.temperature else None
        return verify(logits, tree, self.sampling, width, uniform)

    def cycle(self, width=None):
        """Draft, verify, compact: without a `width`, every shape fixed and every length on the device."""
        self.verify(self.draft(width))

    def step(self):
        """Run one cycle. On a CPU, where the host knows, only as many slots as are new are extended."""
        if self.device.type == "cpu":
            self.cycle(width=int(self.num_accepted.max()) + 1)
        else:
            self.run("cycle", self.cycle)

    @torch.inference_mode()
    def launch(self):
        """Queue one cycle and the copy of what it emits to the host. -> [B, 1 + P] accepted drafts and tokens, and on
        a GPU the event after which they are there."""
        self.step()
        result = torch.cat([self.num_accepted[:, None], self.emitted], dim=1)         # [B, 1 + P]
        if self.device.type == "cpu":
            return result, None
        host = torch.empty(result.shape, dtype=result.dtype, pin_memory=True).copy_(result, non_blocking=True)
        return host, torch.cuda.current_stream(self.device).record_event()

    def cycles(self):
        """Yields, cycle after cycle and without end, the tokens emitted by each sequence: a list of B lists. On a GPU
        the next cycle is already queued when one is read: the device never waits for the host."""
        ahead = [self.launch()] if self.queue_ahead and self.device.type == "cuda" else []
        while True:
            ahead.append(self.launch())
            host, copied = ahead.pop(0)
            if copied is not None:
                copied.synchronize()
            yield [row[1:row[0] + 2] for row in host.tolist()]

    def generate(self, prompts, max_new_tokens, stop=()):
        """Yields, after the prefill and after every cycle, the new tokens of each sequence (empty once finished). One
        ends after `max_new_tokens`, with a token of `stop`, or when the context is full."""
        room = [min(max_new_tokens, self.capacity - len(p)) for p in prompts]
        emitted = itertools.chain([[[token] for token in self.prefill(prompts)]], self.cycles())
        while any(room):
            new = [cut(tokens[:left], stop) for tokens, left in zip(next(emitted), room)]
            room = [0 if tokens and tokens[-1] in stop else left - len(tokens) for tokens, left in zip(new, room)]
            yield new

    def complete(self, prompts, new_tokens):
        """-> a list of token ids for each prompt: the prompt and up to `new_tokens` behind it."""
        texts = [list(prompt) for prompt in prompts]
        for new in self.generate(prompts, new_tokens):
            for text, tokens in zip(texts, new):
                text += tokens
        return texts


def cut(tokens, stop):
    """The tokens up to and including the first one in `stop`."""
    return next((tokens[:i + 1] for i, token in enumerate(tokens) if token in stop), tokens)
