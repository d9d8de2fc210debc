"""The decoding engine: prefill, then draft, verify, compact, repeat. Without a head it is plain decoding.

Every tensor of a cycle has a fixed shape and every length lives on the device, so that on a GPU one cycle is one
CUDA graph; the host only reads what was emitted.
"""
import itertools

import torch

from gto.errors import UserError
from gto.model import Prefix
from gto.tree import Tree, TreeShape, draft_tree, score_temperature
from gto.verify import Sampling, verify


class Engine:
    """Decodes B sequences side by side.

    target, head   head None: plain autoregressive decoding, the same cycle with a tree of only the root
    shape          TreeShape of the drafts
    sampling       Sampling; T=0 is greedy
    capacity       longest sequence, prompt and output together, in tokens
    score_temp     temperature of the tree's scores; None: by the sampling temperature
    """

    def __init__(self, target, head, shape=None, sampling=None, batch=1, capacity=None, score_temp=None):
        self.target, self.head, self.shape = target, head, shape or TreeShape()
        self.sampling, self.batch = sampling or Sampling(), batch
        self.capacity = capacity or target.config.max_len
        self.score_temp = score_temp or score_temperature(self.sampling.temperature)
        self.width = self.shape.levels + 1 if head is not None else 1                 # P: most tokens this cycle emits
        self.device = target.norm.weight.device
        self.graphs = {} if self.device.type == "cuda" else None                      # of `step`, by key
        self.pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
        self.target_cache = target.new_cache(batch, self.capacity + self.width)
        self.head_cache = head.new_cache(batch, self.capacity + self.width) if head is not None else None
        # The state a cycle reads and overwrites in place. `length` counts what the target has cached: everything
        # but the root. `features` and `emitted` are the head's next slots: the last cycle's accepted path.
        self.length = torch.zeros(batch, dtype=torch.long, device=self.device)
        self.count = torch.zeros_like(self.length)                                    # accepted drafts
        self.emitted = torch.zeros(batch, self.width, dtype=torch.long, device=self.device)
        self.features = torch.zeros(batch, self.width, 3 * target.config.dim, dtype=target.norm.weight.dtype,
                                    device=self.device)
        self.root_tree = Tree(*(torch.zeros(batch, 1, dtype=torch.long, device=self.device) for _ in range(2)),
                              torch.ones(batch, 1, 1, dtype=torch.bool, device=self.device),
                              *(torch.zeros(batch, 1, dtype=torch.long, device=self.device) for _ in range(2)))

    @torch.inference_mode()
    def prefill(self, prompts):
        """prompts: B lists of token ids. Fills both caches and returns the first token of each sequence, [B]."""
        if len(prompts) != self.batch:
            raise UserError(f"{len(prompts)} prompts for an engine of {self.batch}")
        for prompt in prompts:
            if not prompt:
                raise UserError("empty prompt: give at least one token to continue")
            if len(prompt) >= self.capacity:
                raise UserError(f"the prompt has {len(prompt)} tokens, the context holds {self.capacity}: shorten it")
        width = max(map(len, prompts))
        tokens = torch.tensor([p + [0] * (width - len(p)) for p in prompts], device=self.device)  # padded on the right
        self.length.copy_(torch.tensor([len(p) for p in prompts]))
        hidden, features, keys, values = self.target(tokens)                          # causal: padding is never seen
        start = torch.zeros_like(self.length)
        self.target_cache.commit(keys, values, start)
        last = (self.length - 1)[:, None, None]                                       # [B, 1, 1]
        logits = self.target.logits(hidden.gather(1, last.expand(-1, 1, hidden.shape[-1])))   # [B, 1, V]
        _, _, emitted = verify(logits, self.root_tree, self.sampling, width=1)
        self.count.zero_()
        self.emitted[:, :1] = emitted
        if self.head is not None:
            # The last slot is left to the first cycle, which overwrites it: its next token is the root.
            slots = torch.arange(width, device=self.device).expand_as(tokens)
            _, keys, values = self.head(self.head.fuse(features), tokens.roll(-1, dims=1), slots)
            self.head_cache.commit([keys], [values], start)
            self.features[:, :1] = features.gather(1, last.expand(-1, 1, features.shape[-1]))
        return self.emitted[:, 0].tolist()

    def extend(self, width=None):
        """Extend the head over the newly committed tokens. Returns its output at the last of them, the root, which
        predicts the tree's first level, [B, dim]; the root [B]; what the tree may see of the head's cache, a Prefix.

        width: the first so many slots are enough, if the host knows; all of them if not.
        """
        emitted, features = self.emitted[:, :width], self.features[:, :width]
        B, P = emitted.shape
        committed = self.length - self.count - 1                                      # [B] slots in the head's cache
        steps = torch.arange(P, device=self.device)
        causal = (steps <= steps[:, None]).expand(B, P, P)
        hidden, keys, values = self.head(self.head.fuse(features), emitted, committed[:, None] + steps,
                                         causal, Prefix(self.head_cache, committed))
        self.head_cache.commit([keys], [values], committed)
        last = self.count[:, None]                                                    # [B, 1]
        hidden = hidden.gather(1, last[..., None].expand(-1, 1, hidden.shape[-1])).squeeze(1)  # [B, dim]
        return hidden, self.emitted.gather(1, last).squeeze(1), Prefix(self.head_cache, self.length)

    def draft(self, width=None):
        """Draft a tree behind the last committed token. width: see `extend`."""
        if self.head is None:
            return self.root_tree._replace(tokens=self.emitted.gather(1, self.count[:, None]))
        return draft_tree(self.head, *self.extend(width), self.shape, self.score_temp)

    def check(self, tree):
        """One target forward over the tree; commits the accepted path and updates the state."""
        hidden, features, keys, values = self.target(tree.tokens, self.length[:, None] + tree.depth, tree.mask,
                                                     Prefix(self.target_cache, self.length))
        path, count, emitted = verify(self.target.logits(hidden), tree, self.sampling, self.width)
        self.target_cache.commit(keys, values, self.length, path)
        self.features[:, :self.width] = features.gather(1, path[..., None].expand(-1, -1, features.shape[-1]))
        self.emitted[:, :self.width] = emitted
        self.count.copy_(count)
        # A finished sequence may wait for others: it stays inside the cache.
        self.length.add_(count + 1).clamp_(max=self.capacity)

    def cycle(self, width=None):
        """Draft, verify, compact: without a `width`, every shape fixed and every length on the device."""
        self.check(self.draft(width))

    def step(self, key, run):
        """`run()`, a part of a cycle, of fixed shapes; on a GPU as a CUDA graph, captured when `key` first comes.

        A graph's result stays where it is, for the graphs that read it, until the next call with this key. All graphs
        share a memory pool in which a result is safe from those captured later only: a result lasts until a graph is
        replayed that was captured before its own.
        """
        if self.graphs is None:
            return run()
        if key not in self.graphs:
            state = self.length, self.count, self.emitted, self.features
            before = [x.clone() for x in state]
            self.graphs[key] = graph_of(run, self.pool)
            for x, was in zip(state, before):                                         # the warm-up has changed it
                x.copy_(was)
        return self.graphs[key]()

    def whole(self, key, run):
        """A whole cycle, or half of one: the same operations every time, so that one CUDA graph serves them all."""
        return self.step(key, run)

    @torch.inference_mode()
    def launch(self):
        """Queue one cycle and the copy of what it emits to the host. -> [B, 1 + P] count and tokens, and on a GPU the
        event after which they are there."""
        if self.graphs is None:
            self.cycle(width=int(self.count.max()) + 1)
            return torch.cat([self.count[:, None], self.emitted], dim=1), None
        self.whole("cycle", self.cycle)
        result = torch.cat([self.count[:, None], self.emitted], dim=1)                # [B, 1 + P]
        host = torch.empty(result.shape, dtype=result.dtype, pin_memory=True).copy_(result, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        return host, copied

    def cycles(self):
        """Yields, cycle after cycle and without end, the tokens emitted by each sequence: a list of B lists.

        On a GPU the next cycle is already queued when one is read: the device never waits for the host.
        """
        ahead = [self.launch()] if self.graphs is not None else []
        while True:
            ahead.append(self.launch())
            host, copied = ahead.pop(0)
            if copied is not None:
                copied.synchronize()
            yield [row[1:row[0] + 2] for row in host.tolist()]

    def generate(self, prompts, max_new_tokens, stop=()):
        """Yields, after the prefill and after every cycle, the new tokens of each sequence (empty once finished).

        A sequence ends after `max_new_tokens`, with a token of `stop`, or when the context is full.
        """
        room = [min(max_new_tokens, self.capacity - len(p)) for p in prompts]
        emitted = itertools.chain([[[token] for token in self.prefill(prompts)]], self.cycles())
        while any(room):
            new = [cut(tokens[:left], stop) for tokens, left in zip(next(emitted), room)]
            room = [0 if tokens and tokens[-1] in stop else left - len(tokens) for tokens, left in zip(new, room)]
            yield new

    def complete(self, prompts, new_tokens):
        """-> a list of token ids for each prompt: the prompt and up to `new_tokens` behind it."""
        rows = [list(prompt) for prompt in prompts]
        for new in self.generate(prompts, new_tokens):
            for row, tokens in zip(rows, new):
                row += tokens
        return rows


def cut(tokens, stop):
    """The tokens up to and including the first one in `stop`."""
    return next((tokens[:i + 1] for i, token in enumerate(tokens) if token in stop), tokens)


def graph_of(run, pool=None):
    """Capture `run()` as a CUDA graph, after two warm-up runs, which compile kernels. Returns its replay, a function
    that gives back what `run` returned, the same tensors each time.

    pool: memory to share with other graphs (torch.cuda.graph_pool_handle())
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = run()

    def replay():
        graph.replay()
        return result
    return replay


def one_thread_on_cpu(device):
    """For decoding one sequence on a CPU: its matrix products are so small that waking a second thread costs more than
    it brings (measured: twice as slow with two). Training wants them all."""
    if str(device) == "cpu":
        torch.set_num_threads(1)
