"""Draw a cycle's draft tree in the terminal: what was proposed, what the target thinks of it, what became of it."""
import torch
from torch.nn import functional as F

from gto.model import Prefix
from gto.rollout import score_inner_nodes
from gto.tokenizer import token_bytes
from gto.tree import Tree, ancestor_mask, draft_candidates, rerank


@torch.no_grad()
def show_tree(engine, prompt, encoding, dropped=2):
    """The first draft behind a prompt (token ids), with at most `dropped` pruned children of a node. -> text, lines."""
    engine.prefill([prompt])
    shape, T, prefix = engine.shape, engine.sampling.temperature, Prefix(engine.target_cache, engine.length.clone())
    hidden, root, head_prefix = engine.extend()
    tokens, parents, scores = draft_candidates(engine.head, hidden, head_prefix, shape, engine.score_temp)
    log_P = path_log_prob(engine.target, root, tokens, parents, prefix, shape, T or 1.0)
    tree = rerank(root, tokens, parents, scores, shape)
    engine.verify(tree)
    emitted = engine.emitted[0, :engine.num_accepted.item() + 1].tolist()

    order = scores[0].sort(descending=True, stable=True).indices.tolist()
    kept, above = set(order[:shape.nodes]), parents[0].tolist()       # candidate index + 1, 0: the root
    of_head, of_target = ((x - F.pad(x, (1, 0)).gather(1, parents)).exp()[0].tolist() for x in (scores, log_P))

    def word(token):
        return repr(token_bytes(encoding, token).decode(errors="replace"))

    lines = [f"{word(root.item())}   (first draft; behind a token the head's probability at score temperature"
             f" {engine.score_temp:g} and the target's)"]

    def draw(node, indent, rest):
        """rest: what the target emits from here on if it comes to this node, its own token last; else nothing."""
        branches = sorted((c for c in order if above[c] == node), key=lambda c: c not in kept)
        branches = branches[:dropped + sum(c in kept for c in branches)]
        for c in branches:
            here = len(rest) > 1 and tokens[0, c].item() == rest[0] and c in kept
            fate = "✓ accepted" if here else "" if c in kept else "✂ pruned"
            last = c == branches[-1]
            line = f"{indent}{'└─' if last else '├─'} {word(tokens[0, c].item())}"
            lines.append(f"{line:<36} {of_head[c]:6.3f} {of_target[c]:6.3f}  {fate}".rstrip())
            draw(c + 1, indent + ("   " if last else "│  "), rest[1:] if here else [])

    draw(0, "", emitted)
    lines.append(f"emitted: {' '.join(map(word, emitted))}   ({len(emitted) - 1} drafts, and the target's own token)")
    return "\n".join(lines)


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
