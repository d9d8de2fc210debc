"""Where the time of a cycle goes, and what the tree does better than the greedy path: the paper's diagnosis.

The *greedy path* of a cycle is the chain of the head's arg-max tokens from the root, as deep as the tree. Its tokens
are drafted here beside the tree, from the same state, so they are known also where the tree dropped them.
"""
import time
from functools import partial

import torch

from gto.engine import Engine
from gto.tree import TreeShape


def greedy_depth(tree, greedy):
    """How deep the greedy path is still in the tree: [B].

    greedy: the Tree of the chain. As in verification, a node lies on the path if it and all its ancestors match.
    """
    matches = tree.tokens == greedy.tokens.gather(1, tree.depth)                      # [B, N]
    on_path = (matches[:, None] | ~tree.mask).all(-1)                                 # [B, N]
    return (tree.depth * on_path).amax(1)


def mark(device):
    """A point in the device's time, for `milliseconds`."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def milliseconds(start, end):
    return (end - start) * 1e3 if isinstance(start, float) else start.elapsed_time(end)


@torch.inference_mode()                    # as Engine.launch: on a CPU no_grad costs a fifth more
def dissect(engine, prompt, new_tokens, stop=()):
    """Decode one prompt as `evaluate.timed` does, cycle by cycle with a look inside.

    Returns a dict of lists, an entry per cycle:
        draft, verify   ms of the two halves
        tree            drafts accepted from the tree
    and, with a head,
        greedy          drafts that the greedy path alone would have had accepted: how many of its tokens are the text
                        that followed. At T > 0 that text is one sample of the target, the same one for tree and path
        kept            depth to which the greedy path is in the tree; less than `levels`: it was pruned, in the final
                        re-ranking or by not being expanded any further
    """
    levels = engine.shape.levels if engine.head is not None else 0
    text, end, starts, paths = engine.prefill([prompt]), None, [], []
    cycles = {name: [] for name in ("draft", "verify", "tree", "greedy", "kept")}
    while True:
        if end is None and (len(text) >= new_tokens or any(token in stop for token in text)):
            end = len(text)                                       # decoding ends here; the last paths need what follows
        if end is not None and len(text) >= end - 1 + levels:
            break
        points = [mark(engine.device)]
        tree = engine.whole("draft", engine.draft)
        points.append(mark(engine.device))
        if levels:
            greedy, kept = greedy_path(engine, tree)
        points.append(mark(engine.device))
        engine.whole("check", partial(engine.check, tree))
        points.append(mark(engine.device))
        count = engine.count.item()                               # waits for the device
        if end is None:
            cycles["draft"].append(milliseconds(*points[:2]))
            cycles["verify"].append(milliseconds(*points[2:]))
            cycles["tree"].append(count)
            starts.append(len(text))
            if levels:
                paths.append(greedy.tolist())
                cycles["kept"].append(kept.item())
        text += engine.emitted[0, :count + 1].tolist()
    for start, path in zip(starts, paths):
        cycles["greedy"].append(next((i for i, token in enumerate(path) if token != text[start + i]), levels))
    return cycles


def greedy_path(engine, tree):
    """The greedy path's tokens [levels] and its depth in the tree [1]. Drafting twice from one state is harmless: the
    head's cache is written with the same values."""
    shape = engine.shape
    engine.shape = TreeShape(1, shape.levels, shape.levels)
    greedy = Engine.draft(engine)                                 # of this shape, also where a policy drafts
    engine.shape = shape
    return greedy.tokens[0, 1:], greedy_depth(tree, greedy)
