"""A cycle for the eye: its tree in the terminal; a page, page.html and its data, to step through a decode or a run."""
import json
import time
from pathlib import Path

import torch
from torch.nn import functional as F

from gto.engine import cut
from gto.model import Prefix
from gto.rollout import score_inner_nodes
from gto.tokenizer import StreamDecoder, token_bytes
from gto.tree import Tree, ancestor_mask, candidates
from gto.util import rank, synchronize, write_text


@torch.inference_mode()
def watch(engine, prompt, encoding, new_tokens, stop=()):
    """Decode a prompt (token ids) as `engine.generate` does. -> what is to be seen of it, ready for JSON: prompt, its
    text; setting; score_temp; cycles, the first being the prefill, which drafts nothing. Each has

    emitted  texts of the tokens; all but the last one were drafted
    nodes    the tree, and the best of each node's pruned children; node 0 is the root, parents come first: token,
             parent, head and target (probabilities of the token behind its path: the head's at the engine's
             score temperature, the target's at the decoding temperature), path (product of the head's), kept, accepted
    ms       by part of the cycle. On a GPU slower than in decoding, where all parts are one CUDA graph"""
    decoder, room = StreamDecoder(encoding), min(new_tokens, engine.capacity - len(prompt))
    new = engine.prefill([prompt])
    cycles, written = [{"emitted": [decoder.push(new)], "nodes": [], "ms": {}}], 1
    while written < room and not any(token in stop for token in new):
        prefix, times = Prefix(engine.target_cache, engine.length.clone()), [moment(engine)]
        root, draft, kept = engine.draft_levels(width=int(engine.num_accepted) + 1)
        tree = engine.tree(root, draft, kept)
        times.append(moment(engine))
        engine.verify(tree)
        times.append(moment(engine))
        new = cut(engine.emitted[0, :int(engine.num_accepted) + 1].tolist(), stop)
        with torch.random.fork_rng():                                                 # what is emitted stays the same
            nodes = describe(engine, encoding, root, draft, kept, prefix, new) if draft else []
        parts = zip(("draft", "verify"), times, times[1:])
        cycles.append({"emitted": [decoder.push([token]) for token in new[:room - written]], "nodes": nodes,
                       "ms": {part: 1e3 * (end - begin) for part, begin, end in parts}})
        written += len(new)
    return {"prompt": encoding.decode(prompt), "cycles": cycles, "score_temp": engine.score_temp,
            "setting": f"tree {engine.shape}{'' if engine.queue_ahead else ' at most'}, T={engine.sampling.temperature:g}"}


def moment(engine):
    synchronize(engine.device)
    return time.perf_counter()


def describe(engine, encoding, root, draft, size, prefix, emitted):
    """The nodes of a cycle: of a Draft behind `root`, of which the `size` best were verified."""
    tokens, parents, scores = candidates(draft)                                       # [1, C] each
    T = engine.sampling.temperature or 1.0
    log_P = path_log_prob(engine.target, root, tokens, parents, prefix, engine.shape, T)
    above, words, path = (x[0].tolist() for x in (parents, tokens, scores.exp()))     # above: index + 1, 0: the root
    of_head, of_target = ((x - F.pad(x, (1, 0)).gather(1, parents)).exp()[0].tolist() for x in (scores, log_P))
    order = scores[0].sort(descending=True, stable=True).indices.tolist()
    kept = set(order[:size])
    best_cut = {above[c]: c for c in reversed(order) if c not in kept and (above[c] == 0 or above[c] - 1 in kept)}
    text = [token_bytes(encoding, token).decode(errors="replace") for token in (root.item(), *words)]
    nodes = [{"token": text[0], "parent": 0, "head": 1.0, "target": 1.0, "path": 1.0, "kept": True, "accepted": True}]
    number, at, depth = {0: 0}, 0, 0        # at: number (candidate + 1) of the last accepted node, `depth` levels down
    for c in sorted(kept | set(best_cut.values())):
        accepted = c in kept and above[c] == at and depth < len(emitted) - 1 and words[c] == emitted[depth]
        if accepted:
            at, depth = c + 1, depth + 1
        number[c + 1] = len(nodes)
        nodes.append({"token": text[c + 1], "parent": number[above[c]], "head": of_head[c], "target": of_target[c],
                      "path": path[c], "kept": c in kept, "accepted": accepted})
    return nodes


@torch.no_grad()
def path_log_prob(target, root, tokens, parents, prefix, shape, temperature):
    """The log-probability that the target, decoding at `temperature`, goes down the path to each candidate of a draft,
    those that the re-ranking drops too. -> [B, C]. At T=0 it is 0 on the greedy path and hugely negative off it.
    root [B]; tokens, parents [B, C]; prefix: the target's, up to but not with the root."""
    parents = F.pad(parents, (1, 0))                                                  # [B, C + 1]
    mask = ancestor_mask(parents, shape.depth)
    tree = Tree(torch.cat([root[:, None], tokens], dim=1), parents, mask, mask.sum(-1) - 1, None)
    _, step = score_inner_nodes(target, tree, prefix, max(temperature, 1e-6))
    return torch.where(mask, step[:, None], 0.0).sum(-1)[:, 1:]


def tree_text(watched):
    """The first cycle that drafts, drawn for the terminal."""
    drafted = [cycle for cycle in watched["cycles"] if cycle["nodes"]]
    if not drafted:
        return "no tree: plain decoding, by the target alone"
    nodes, emitted = drafted[0]["nodes"], drafted[0]["emitted"]
    lines = [f"{nodes[0]['token']!r}   (behind a token the head's probability at score temperature"
             f" {watched['score_temp']:g} and the target's)"]

    def draw(parent, indent):
        branches = [i for i, node in enumerate(nodes) if i and node["parent"] == parent]
        branches.sort(key=lambda i: (not nodes[i]["kept"], -nodes[i]["path"]))
        for i in branches:
            node, last = nodes[i], i == branches[-1]
            fate = "✓ accepted" if node["accepted"] else "" if node["kept"] else "✂ pruned"
            line = f"{indent}{'└─' if last else '├─'} {node['token']!r}"
            lines.append(f"{line:<36} {node['head']:6.3f} {node['target']:6.3f}  {fate}".rstrip())
            draw(i, indent + ("   " if last else "│  "))

    draw(0, "")
    lines.append(f"emitted: {' '.join(map(repr, emitted))}   ({len(emitted) - 1} drafts, and the target's own token)")
    return "\n".join(lines)


def write_page(path, title, decode, notes=(), rows=(), **run):
    """decode: what `watch` returns; notes: paragraphs; rows: of a table; run: what else `evaluate.report` found."""
    data = json.dumps({"title": title, "decode": decode, "notes": notes, "rows": rows, **run}, default=str)
    data, page = data.replace("<", "\\u003c"), Path(__file__).with_name("page.html")  # no </script> among the tokens
    if rank() == 0:
        write_text(path, page.read_text(encoding="utf-8").replace("null /* the page's data */", data))
