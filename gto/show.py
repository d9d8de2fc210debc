"""Draw a cycle's draft tree in the terminal: what was proposed, what the target thinks of it, what became of it."""
import torch

from gto.candidates import path_log_prob
from gto.model import Prefix
from gto.tree import draft_candidates, rerank


@torch.no_grad()
def show_tree(engine, prompt, encoding, dropped=2):
    """The first draft behind a prompt (token ids), with at most `dropped` pruned children of a node. -> text, lines."""
    engine.prefill([prompt])
    shape, T, prefix = engine.shape, engine.sampling.temperature, Prefix(engine.target_cache, engine.length.clone())
    hidden, root, head_prefix = engine.extend()
    tokens, parents, scores = draft_candidates(engine.head, hidden, head_prefix, shape, engine.score_temp)
    log_P = path_log_prob(engine.target, root, tokens, parents, prefix, shape, T or 1.0)
    tree = rerank(root, tokens, parents, scores, shape)
    engine.check(tree)
    emitted = engine.emitted[0, :engine.count.item() + 1].tolist()

    order = scores[0].sort(descending=True, stable=True).indices.tolist()
    kept, children = set(order[:shape.nodes]), {}
    for c in order:
        children.setdefault(parents[0, c].item(), []).append(c)      # by candidate index + 1, best first

    def word(token):
        return repr(encoding.decode_single_token_bytes(token).decode(errors="replace"))

    def step(log_probs, c):                                           # probability of a token behind its own parent
        above = parents[0, c].item()
        return (log_probs[0, c] - (log_probs[0, above - 1] if above else 0)).exp().item()

    lines = [f"{word(root.item())}   (first draft; behind a token the head's probability at score temperature"
             f" {engine.score_temp:g} and the target's)"]

    def draw(node, indent, rest):
        """rest: what the target goes on with if it comes to this node, else None."""
        inner, pruned = ([c for c in children.get(node, []) if (c in kept) is keep] for keep in (True, False))
        branches = inner + pruned[:dropped]
        for c in branches:
            here = rest is not None and len(rest) > 1 and tokens[0, c].item() == rest[0] and c in kept
            fate = "✓ accepted" if here else "" if c in kept else "✂ pruned"
            last = c == branches[-1]
            line = f"{indent}{'└─' if last else '├─'} {word(tokens[0, c].item())}"
            lines.append(f"{line:<36} {step(scores, c):6.3f} {step(log_P, c):6.3f}  {fate}".rstrip())
            draw(c + 1, indent + ("   " if last else "│  "), rest[1:] if here else None)

    draw(0, "", emitted)
    lines.append("emitted: " + " ".join(map(word, emitted)) + f"   ({len(emitted) - 1} drafts, and the target's own token)")
    return "\n".join(lines)
