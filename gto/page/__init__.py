"""A cycle for the eye: its tree in the terminal; a page, page.html and its data, to step through a decode or a run."""
import json
from pathlib import Path

import torch
from torch.nn import functional as F

from gto.engine import cut
from gto.model import Prefix
from gto.rollout import score_inner_nodes
from gto.tokenizer import StreamDecoder, token_bytes
from gto.tree import Tree, ancestor_mask, candidates
from gto.util import synchronize, write_whole


@torch.inference_mode()
def watch(engine, prompt, encoding, new_tokens, stop=()):
    """Decode a prompt (token ids) as `engine.generate` does. -> what is to be seen of it, ready for JSON: prompt, its
    text; setting; score_temp; cycles, the first being the prefill, which drafts nothing. Each has
    emitted  texts of the tokens; all but the last one were drafted
    nodes    the tree, and the best of each node's pruned children; parents come first: token, parent, head and target
             (the token's probability behind its path, at the temperature of scores, of decoding), path (product of
             the head's), kept, accepted
    ms       by part of the cycle. On a GPU slower than in decoding, where all parts are one CUDA graph"""
    decoder, room = StreamDecoder(encoding), min(new_tokens, engine.capacity - len(prompt))
    new = engine.prefill([prompt])
    cycles, written = [{"emitted": [decoder.push(new)], "nodes": [], "ms": {}}], 1
    while written < room and not any(token in stop for token in new):
        prefix, began = Prefix(engine.target_cache, engine.length.clone()), synchronize(engine.device)
        root, draft, kept = engine.draft_levels(width=int(engine.num_accepted) + 1)
        tree = engine.tree(root, draft, kept)
        drafted = synchronize(engine.device)
        engine.verify(tree)
        ms = {"draft": 1e3 * (drafted - began), "verify": 1e3 * (synchronize(engine.device) - drafted)}
        new = cut(engine.emitted[0, :int(engine.num_accepted) + 1].tolist(), stop)
        with torch.random.fork_rng():                                                 # what is emitted stays the same
            nodes = describe(engine, encoding, root, draft, kept, prefix, new) if draft else []
        cycles.append({"emitted": [decoder.push([token]) for token in new[:room - written]], "nodes": nodes, "ms": ms})
        written += len(new)
    return {"prompt": encoding.decode(prompt), "cycles": cycles, "score_temp": engine.score_temp,
            "setting": f"tree {engine.shape}{' at most' * (not engine.queue_ahead)}, T={engine.sampling.temperature:g}"}


def describe(engine, encoding, root, draft, size, prefix, emitted):
    """The nodes of a cycle: of a Draft behind `root`, of which the `size` best were verified."""
    tokens, parents, scores = candidates(draft)                                       # [1, C] each
    T = engine.sampling.temperature or 1.0
    log_P = path_log_prob(engine.target, root, tokens, parents, prefix, engine.shape, T)
    parents, scores, log_P = (F.pad(x, (1, 0)) for x in (parents, scores, log_P))     # [1, 1 + C]: the root is 0
    of_head, of_target = ((x - x.gather(1, parents)).exp()[0].tolist() for x in (scores, log_P))
    above, path, words = parents[0].tolist(), scores[0].exp().tolist(), [root.item(), *tokens[0].tolist()]
    order = (scores[0, 1:].sort(descending=True, stable=True).indices + 1).tolist()
    kept = {0, *order[:size]}
    best_cut = {above[c]: c for c in reversed(order) if c not in kept and above[c] in kept}
    nodes, number, chosen, at, depth = [], {}, [words[0], *emitted[:-1]], 0, 0        # at: the last accepted node
    for c in sorted(kept | set(best_cut.values())):
        accepted = c in kept and above[c] == at and depth < len(chosen) and words[c] == chosen[depth]
        if accepted:
            at, depth = c, depth + 1
        number[c] = len(nodes)
        nodes.append({"token": token_bytes(encoding, words[c]).decode(errors="replace"), "parent": number[above[c]],
                      "head": of_head[c], "target": of_target[c], "path": path[c], "kept": c in kept,
                      "accepted": accepted})
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
    nodes, emitted = next(((c["nodes"], c["emitted"]) for c in watched["cycles"] if c["nodes"]), ([], []))
    if not nodes:
        return "no tree: plain decoding, by the target alone"
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
    write_whole(path, page.read_text(encoding="utf-8").replace("null /* the page's data */", data))
