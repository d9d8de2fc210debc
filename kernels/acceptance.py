"""Scoring rows of logits: what the target chooses after every tree node and thinks of it, what a draft head proposes.

A row of logits (one node) is 128k numbers and there are only 60 of them, so a row is cut into chunks, each read once by
one program: its largest logit, the sum of exp(logit - largest), and its k best logits. From these few numbers a second
kernel has the row's log-sum-exp and k best: what a head proposes, or for k = 1 the choice at T=0. At T>0 the choice is
a sample by inverse CDF, from ONE uniform number u: the chunk sums say in which chunk the cumulated probability passes
u, and only that chunk is read again to find the token. (Gumbel noise would need a random number for every logit.)
What the target thinks of a node is one logit minus its parent's log-sum-exp."""
import math

import torch

from kernels import tl, triton, use_triton

CHUNK = 4096          # logits per program: 32 a thread, all in flight at once
PROPOSE_CHUNK = 1024  # a draft's level has 10 rows of 32k, not 60 of 128k: smaller ones fill the processors, too


def score_nodes(logits, tokens=None, parents=None, temperature=0.0, uniform=None):
    """What the target chooses at every node, and what it thinks of every node's token.
    logits   [B, N, V]  the target's logits after each node; -inf masks a token out
    tokens   [B, M]     node tokens; node 0 is the root. None: only the choices are wanted, log_prob is None
    parents  [B, M]     where in `logits` each node's parent is: with M > N, those of leaves are not there
    temperature         of both; 0: the choice is the arg-max (of ties the lowest index), log_prob at temperature 1
    uniform  [B, N]     random numbers in [0, 1), one per node, needed where temperature > 0
    Returns  choice [B, N] int64, the target's next token after each node;
             log_prob [B, M] float32, log T(token of the node | prefix, ancestors); 0 for the root"""
    if use_triton(logits):
        return score_nodes_triton(logits, tokens, parents, temperature, uniform)
    if temperature == 0:
        choice = logits.argmax(-1)                                                    # [B, N]
    else:  # inverse CDF: the first token whose cumulated probability exceeds u times the total
        cumulated = (logits.float() / temperature).softmax(-1).cumsum(-1)             # [B, N, V]
        choice = torch.searchsorted(cumulated, uniform[..., None] * cumulated[..., -1:], right=True).squeeze(-1)
    if tokens is None:
        return choice, None
    log_p = torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)          # [B, N, V]
    log_prob = log_p[torch.arange(len(tokens), device=tokens.device)[:, None], parents, tokens]  # [B, M]
    return choice, log_prob.index_fill(1, torch.zeros(1, dtype=torch.long, device=tokens.device), 0.0)


def propose(logits, token_ids, k, temperature):
    """The k likeliest next tokens: logits [..., V], token_ids [V] the target's name of each. -> log-probabilities at
    this temperature, float32, and target token ids, [..., k] each, best first. Ties: the lowest index (topk: any)."""
    V = logits.shape[-1]
    if not use_triton(logits) or k > 64:                                   # more would fill a program's registers
        log_p, index = torch.log_softmax(logits.float() / temperature, dim=-1).topk(k, dim=-1)
        return log_p, token_ids[index]
    chunk, scale = min(PROPOSE_CHUNK, triton.next_power_of_2(V)), math.log2(math.e) / temperature
    scanned = scan(logits.reshape(-1, V), scale, chunk, k)
    log_p = logits.new_empty(*logits.shape[:-1], k, dtype=torch.float32)
    tokens = torch.empty_like(log_p, dtype=torch.long)
    _best_kernel[(logits.numel() // V,)](*scanned, token_ids, tokens, log_p, scale, triton.cdiv(V, chunk), K=k)
    return log_p, tokens


@triton.jit
def _scan_kernel(logits_ptr, top_ptr, sum_ptr, best_ptr, index_ptr, logits_row, scale,
                 V: tl.constexpr, CHUNK: tl.constexpr, K: tl.constexpr):
    """One chunk of one row: its largest logit, the sum of exp(logit - largest), and the K best and where they are."""
    out = tl.program_id(0)        # one dimension: a grid's others end at 65,535, and a training step has as many rows
    chunks: tl.constexpr = triton.cdiv(V, CHUNK)
    # int64: B * N * V passes 2^31 from 280 trees of 60 nodes at V = 128k.
    row, here = (out // chunks).to(tl.int64), tl.arange(0, CHUNK)
    at = out % chunks * CHUNK + here
    x = tl.load(logits_ptr + row * logits_row + at, mask=at < V, other=float("-inf")).to(tl.float32)
    # A chunk may be masked out entirely: a finite maximum keeps -inf - -inf = NaN away.
    top = tl.maximum(tl.max(x, axis=0), -1e20)
    tl.store(top_ptr + out, top)
    # In base 2, where exp2 is one instruction: scale = log2(e) / T.
    tl.store(sum_ptr + out, tl.sum(tl.exp2(x * scale - top * scale), axis=0))
    # The raw logits decide: scaled ones could round to a tie. Only what is taken, or behind the end, is -inf.
    x = tl.where(at < V, tl.maximum(x, -3e38), float("-inf"))
    for i in range(K):
        best, index = tl.max(x, axis=0, return_indices=True)           # the lowest index among equals
        tl.store(best_ptr + out * K + i, best)
        tl.store(index_ptr + out * K + i, out % chunks * CHUNK + index)
        x = tl.where(here == index, float("-inf"), x)


@triton.jit
def _row_mass(top_ptr, sum_ptr, row, scale, chunks: tl.constexpr):
    """The chunks' shares of a row's exp-sum relative to the row's maximum, and that maximum (base 2)."""
    chunk = tl.arange(0, triton.next_power_of_2(chunks))
    top = tl.load(top_ptr + row * chunks + chunk, mask=chunk < chunks, other=-1e20) * scale
    mass = tl.load(sum_ptr + row * chunks + chunk, mask=chunk < chunks, other=0.0)
    row_top = tl.max(top, axis=0)
    return mass * tl.exp2(top - row_top), row_top


@triton.jit
def _first_above(mass, threshold):
    """Index of the first entry at which the cumulated mass exceeds the threshold, and the mass before it.
    A parallel sum rounds differently from entry to entry, so the cumulated mass may rise where the mass is 0, or its
    end stay below the threshold: an entry without mass is never taken, the last one with mass is the default."""
    index = tl.arange(0, mass.shape[0])
    last = tl.max(tl.where(mass > 0, index, 0), axis=0)
    first = tl.min(tl.where((mass > 0) & (tl.cumsum(mass, axis=0) > threshold), index, last), axis=0)
    return first, tl.sum(tl.where(index < first, mass, 0.0), axis=0)


@triton.jit
def _best_kernel(top_ptr, sum_ptr, best_ptr, index_ptr, token_ids_ptr, token_ptr, log_prob_ptr, scale,
                 chunks: tl.constexpr, K: tl.constexpr):
    """One row: the K best of its chunks' K best. Those of lower indices stand first: ties stay in order."""
    row, entry = tl.program_id(0).to(tl.int64), tl.arange(0, triton.next_power_of_2(chunks * K))
    x = tl.load(best_ptr + row * chunks * K + entry, mask=entry < chunks * K, other=float("-inf"))
    mass, row_top = _row_mass(top_ptr, sum_ptr, row, scale, chunks)
    log_sum = row_top + tl.log2(tl.sum(mass, axis=0))
    for i in range(K):
        best, taken = tl.max(x, axis=0, return_indices=True)
        token = tl.load(index_ptr + row * chunks * K + taken).to(tl.int64)
        if token_ids_ptr is not None:
            token = tl.load(token_ids_ptr + token)
        tl.store(token_ptr + row * K + i, token)
        if log_prob_ptr is not None:                                   # base 2 to base e
            tl.store(log_prob_ptr + row * K + i, (best * scale - log_sum) * 0.6931471805599453)
        x = tl.where(entry == taken, float("-inf"), x)


@triton.jit
def _sample_kernel(logits_ptr, top_ptr, sum_ptr, uniform_ptr, choice_ptr, logits_row, scale,
                   chunks: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr):
    """One row: the target's choice at T > 0."""
    row = tl.program_id(0).to(tl.int64)
    mass, row_top = _row_mass(top_ptr, sum_ptr, row, scale, chunks)
    threshold = tl.load(uniform_ptr + row) * tl.sum(mass, axis=0)
    taken, before = _first_above(mass, threshold)
    at = taken * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits_ptr + row * logits_row + at, mask=at < V, other=float("-inf")).to(tl.float32)
    top = tl.load(top_ptr + row * chunks + taken) * scale       # relative to the chunk's own maximum nothing vanishes
    first, _ = _first_above(tl.exp2(x * scale - top), (threshold - before) * tl.exp2(row_top - top))
    tl.store(choice_ptr + row, (taken * CHUNK + first).to(tl.int64))


@triton.jit
def _log_prob_kernel(logits_ptr, top_ptr, sum_ptr, tokens_ptr, parents_ptr, log_prob_ptr, N, M, logits_row, scale,
                     chunks: tl.constexpr):
    """One node: the log-probability of its token under its parent's row."""
    node = tl.program_id(0)
    row = node // M * N + tl.load(parents_ptr + node)                                 # int64, as parents are
    mass, row_top = _row_mass(top_ptr, sum_ptr, row, scale, chunks)
    x = tl.load(logits_ptr + row * logits_row + tl.load(tokens_ptr + node)).to(tl.float32)
    log_prob = (x * scale - row_top - tl.log2(tl.sum(mass, axis=0))) * 0.6931471805599453      # base 2 to base e
    tl.store(log_prob_ptr + node, tl.where(node % M == 0, 0.0, log_prob))


def scan(rows, scale, chunk, k):
    """rows [R, V] of logits -> per chunk of each row its maximum and exp-sum, [R, chunks] each, and its k best logits
    and where they are, [R, chunks * k] each."""
    (R, V), chunks = rows.shape, triton.cdiv(rows.shape[1], chunk)
    top, sums = rows.new_empty(2, R, chunks, dtype=torch.float32)
    best = rows.new_empty(R, chunks * k, dtype=torch.float32)
    index = torch.empty_like(best, dtype=torch.int32)
    _scan_kernel[(R * chunks,)](rows, top, sums, best, index, rows.stride(0), scale, V=V, CHUNK=chunk, K=k)
    return top, sums, best, index


def score_nodes_triton(logits, tokens=None, parents=None, temperature=0.0, uniform=None):
    (B, N, V), scale = logits.shape, math.log2(math.e) / (temperature or 1.0)
    rows, chunk = logits.reshape(B * N, V), min(CHUNK, triton.next_power_of_2(V))
    choice, chunks = logits.new_empty(B, N, dtype=torch.long), triton.cdiv(V, chunk)
    top, sums, best, index = scan(rows, scale, chunk, k=int(temperature == 0))
    if temperature == 0:
        _best_kernel[(B * N,)](top, sums, best, index, None, choice, None, scale, chunks, K=1)
    else:
        _sample_kernel[(B * N,)](rows, top, sums, uniform.contiguous(), choice, rows.stride(0), scale, chunks, V, chunk)
    if tokens is None:
        return choice, None
    log_prob = torch.empty(tokens.shape, dtype=torch.float32, device=logits.device)
    _log_prob_kernel[(tokens.numel(),)](rows, top, sums, tokens.contiguous(), parents.contiguous(), log_prob, N,
                                        tokens.shape[1], rows.stride(0), scale, chunks)
    return choice, log_prob
