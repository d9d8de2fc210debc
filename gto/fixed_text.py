"""Acceptance length on texts that the target has written before: every head meets the same text, so only heads differ.

At T=0 the text behind a prompt does not depend on who drafts, nor has it to at T>0: the target's draws may be made in
advance, one per position instead of one per node (verification meets at most one node of a position). Decoding then is
walking along a known text. A cycle drafts at the current root, accepts the path that the text goes, and moves on:
no target forward, no sampling noise between two heads. The tau is that of decoding: at T=0 in every cycle, at T>0 in
distribution.
"""
from typing import NamedTuple

import torch

from gto.engine import Engine
from gto.model import KV, Prefix
from gto.rollout import Text, read
from gto.tree import draft_tree
from gto.verify import Sampling
from kernels.acceptance import accept


class FixedText(NamedTuple):
    text: Text               # [B, T], padded on the right
    start: torch.Tensor      # [B] the first root: the token after the prompt
    stop: torch.Tensor       # [B] decoding ends with the cycle that reaches it


def write(target, prompts, new_tokens, temperature, levels, seed=0):
    """Let the target continue the prompts (lists of token ids) by `new_tokens`, and what a tree of `levels` sees."""
    torch.manual_seed(seed)
    ahead = new_tokens + levels
    engine = Engine(target, None, sampling=Sampling(temperature), batch=len(prompts),
                    capacity=max(map(len, prompts)) + ahead)
    rows = [list(prompt) for prompt in prompts]
    for new in engine.generate(prompts, ahead):
        for row, tokens in zip(rows, new):
            row += tokens
    width = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=engine.device)
    start = torch.tensor([len(prompt) for prompt in prompts], device=engine.device)
    return FixedText(read(target, tokens), start, start + new_tokens - 1)


def every_other(fixed):
    """The texts 0, 2, 4, .."""
    tokens, features, logits, (keys, values), supervised = fixed.text
    kv = KV([k[::2] for k in keys], [v[::2] for v in values])
    text = Text(tokens[::2], features[::2], logits[::2], kv, supervised[::2])
    return FixedText(text, fixed.start[::2], fixed.stop[::2])


@torch.no_grad()
def walk(fixed, draft):
    """Decode all texts. draft(rows [n], length [n]) -> a Tree behind the token at `length` of each of these texts.

    Returns tau [B]: tokens emitted per cycle, the target's own one counted.
    """
    length, cycles = fixed.start.clone(), torch.zeros_like(fixed.start)
    while len(rows := (length < fixed.stop).nonzero().squeeze(1)):
        tree = draft(rows, length[rows])
        says = length[rows, None] + tree.depth + 1                                    # a leaf's is not looked at
        choice = fixed.text.tokens[rows[:, None], says.clamp(max=fixed.text.tokens.shape[1] - 1)]
        _, count, _ = accept(tree.tokens, tree.parents, tree.mask, choice, tree.tokens.shape[1])
        length[rows] += count + 1
        cycles[rows] += 1
    return (length - fixed.start) / cycles.clamp(min=1)


@torch.no_grad()
def read_by(head, text):
    """The head's output at every slot of a text, [B, T, dim], and its keys and values."""
    slots = torch.arange(text.tokens.shape[1], device=text.tokens.device).expand_as(text.tokens)
    hidden, k, v = head(head.fuse(text.features), text.tokens.roll(-1, dims=1), slots)
    return hidden, KV([k], [v])


def tau(head, fixed, shape, score_temp):
    """Acceptance length [B] of a head's trees."""
    hidden, kv = read_by(head, fixed.text)
    return walk(fixed, lambda rows, length: draft_tree(
        head, hidden[rows, length - 1], fixed.text.tokens[rows, length], Prefix(kv, length, rows), shape, score_temp))
