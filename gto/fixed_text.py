"""Acceptance length on texts that the target has written before: every head meets the same text, so only heads differ.

At T=0 the text behind a prompt does not depend on who drafts, nor has it to at T>0: the target's draws may be made in
advance, one per position instead of one per node (verification meets at most one node of a position). Decoding then is
walking along a known text. A cycle drafts at the current root, accepts the path that the text goes, and moves on:
no target forward, no sampling noise between two heads. The tau is that of decoding: at T=0 in every cycle, at T>0 in
distribution.
"""
from typing import NamedTuple

import torch

from gto.diagnose import greedy_depth
from gto.engine import Engine
from gto.model import KV, Prefix
from gto.rollout import Text, read
from gto.tree import TreeShape, draft_tree
from gto.verify import Sampling
from kernels.acceptance import accept

SCORE_TEMPS = {0.0: (0.2, 0.4, 0.6, 1.0), 1.0: (0.6, 1.0, 1.5)}    # to choose from, by decoding temperature


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
    rows = engine.complete(prompts, ahead)
    width = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=engine.device)
    start = torch.tensor([len(prompt) for prompt in prompts], device=engine.device)
    return FixedText(read(target, tokens), start, start + new_tokens - 1)


def written(fixed, new_tokens):
    """The first `new_tokens` behind each prompt, a list each."""
    return [row[start:start + new_tokens] for row, start in zip(fixed.text.tokens.tolist(), fixed.start.tolist())]


def every_other(fixed):
    """The texts 0, 2, 4, .."""
    tokens, features, logits, (keys, values), supervised = fixed.text
    kv = KV([k[::2] for k in keys], [v[::2] for v in values])
    text = Text(tokens[::2], features[::2], logits[::2], kv, supervised[::2])
    return FixedText(text, fixed.start[::2], fixed.stop[::2])


def follow(fixed, rows, length, tree):
    """How many of its drafts a tree behind the token at `length` of these texts gets accepted, [n]."""
    says = length[:, None] + tree.depth + 1                                           # a leaf's is not looked at
    choice = fixed.text.tokens[rows[:, None], says.clamp(max=fixed.text.tokens.shape[1] - 1)]
    return accept(tree.tokens, tree.parents, tree.mask, choice, tree.tokens.shape[1])[1]


@torch.no_grad()
def walk(fixed, draft):
    """Decode all texts. draft(rows [n], length [n]) -> a Tree behind the token at `length` of each of these texts.

    Returns tau [B]: tokens emitted per cycle, the target's own one counted.
    """
    length, cycles = fixed.start.clone(), torch.zeros_like(fixed.start)
    while len(rows := (length < fixed.stop).nonzero().squeeze(1)):
        length[rows] += follow(fixed, rows, length[rows], draft(rows, length[rows])) + 1
        cycles[rows] += 1
    return (length - fixed.start) / cycles.clamp(min=1)


@torch.no_grad()
def read_by(head, text):
    """The head's output at every slot of a text, [B, T, dim], and its keys and values."""
    slots = torch.arange(text.tokens.shape[1], device=text.tokens.device).expand_as(text.tokens)
    hidden, k, v = head(head.fuse(text.features), text.tokens.roll(-1, dims=1), slots)
    return hidden, KV([k], [v])


def drafting(head, fixed, score_temp):
    """-> draft(rows, length, shape), which drafts a Tree behind the token at `length` of each of these texts."""
    hidden, kv = read_by(head, fixed.text)
    return lambda rows, length, shape: draft_tree(
        head, hidden[rows, length - 1], fixed.text.tokens[rows, length], Prefix(kv, length, rows), shape, score_temp)


def tau(head, fixed, shape, score_temp):
    """Acceptance length [B] of a head's trees."""
    draft = drafting(head, fixed, score_temp)
    return walk(fixed, lambda rows, length: draft(rows, length, shape))


def best_score_temp(head, fixed, shape, temperatures):
    """-> the temperature of the scores with the largest mean tau, and all of them {temperature: mean tau}."""
    tuned = {s: tau(head, fixed, shape, s).mean().item() for s in temperatures}
    return max(tuned, key=tuned.get), tuned


def tau_and_diagnosis(head, fixed, shape, score_temp):
    """Acceptance length [B], and over all cycles the two shares of the paper's diagnosis (see `gto.diagnose`): those in
    which the head's greedy path is not in the tree to its full depth, and those in which the tree gets accepted just
    what the greedy path alone would have."""
    draft, chain, pruned, matched = drafting(head, fixed, score_temp), TreeShape(1, shape.levels, shape.levels), [], []

    def tree_and_path(rows, length):
        tree, path = draft(rows, length, shape), draft(rows, length, chain)
        pruned.append(greedy_depth(tree, path) < shape.levels)
        matched.append(follow(fixed, rows, length, tree) == follow(fixed, rows, length, path))
        return tree

    lengths = walk(fixed, tree_and_path)
    return lengths, torch.cat(pruned).float().mean().item(), torch.cat(matched).float().mean().item()
