"""Draw a cycle's draft tree in the terminal: what was proposed, what the target thinks of it, what became of it."""
import torch
from torch.nn import functional as F

from gto.model import Prefix
from gto.tokenizer import token_bytes
from gto.tree import ancestor_mask, draft_candidates, rerank


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
    kept, children = set(order[:shape.nodes]), {}
    for c in order:
        children.setdefault(parents[0, c].item(), []).append(c)      # by candidate index + 1, best first

    def word(token):
        return repr(token_bytes(encoding, token).decode(errors="replace"))

    def step(log_probs, c):                                           # probability of a token behind its own parent
        above = parents[0, c].item()
        return (log_probs[0, c] - (log_probs[0, above - 1] if above else 0)).exp().item()

    lines = [f"{word(root.item())}   (first draft; behind a token the head's probability at score temperature"
             f" {engine.score_temp:g} and the target's)"]

    def draw(node, indent, rest):
        """rest: what the target emits from here on if it comes to this node, its own token last; else nothing."""
        branches = sorted(children.get(node, []), key=lambda c: c not in kept)
        branches = branches[:dropped + sum(c in kept for c in branches)]
        for c in branches:
            here = len(rest) > 1 and tokens[0, c].item() == rest[0] and c in kept
            fate = "✓ accepted" if here else "" if c in kept else "✂ pruned"
            last = c == branches[-1]
            line = f"{indent}{'└─' if last else '├─'} {word(tokens[0, c].item())}"
            lines.append(f"{line:<36} {step(scores, c):6.3f} {step(log_P, c):6.3f}  {fate}".rstrip())
            draw(c + 1, indent + ("   " if last else "│  "), rest[1:] if here else [])

    draw(0, "", emitted)
    lines.append(f"emitted: {' '.join(map(word, emitted))}   ({len(emitted) - 1} drafts, and the target's own token)")
    return "\n".join(lines)


@torch.no_grad()
def path_log_prob(target, root, tokens, parents, prefix, shape, temperature):
    """The log-probability that the target, decoding at `temperature`, goes down the path to each candidate of a draft,
    those that the re-ranking drops too. -> [B, C]. Candidate c is a child of *inner node* c // k: the root is inner
    node 0, then come the expanded nodes.

    root [B]; tokens, parents [B, C]; prefix: the target's, up to but not with the root. At T=0 it is 0 on the greedy
    path and -inf off it. One target forward over the inner nodes, 1 + (depth - 1) * k of them: leaves need none."""
    B, k = len(root), shape.top_k
    inner = parents[:, ::k]                                                           # [B, I] candidate index + 1
    inner_parents = ((inner - 1) // k).clamp(min=0)                                   # [B, I] index among inner nodes
    inner_tokens = torch.cat([root[:, None], tokens], dim=1).gather(1, inner)
    mask = ancestor_mask(inner_parents, shape.depth)                                 # [B, I, I]
    hidden, *_ = target(inner_tokens, prefix.length[:, None] + mask.sum(-1) - 1, mask, prefix, keep_kv=False)
    logits = target.logits(hidden).float()                                            # [B, I, V]
    children = tokens.view(B, -1, k)                                                  # [B, I, k]
    if temperature == 0:
        step = torch.where(children == logits.argmax(-1, keepdim=True), 0.0, float("-inf"))
    else:
        logits = logits / temperature
        step = logits.gather(2, children) - logits.logsumexp(-1, keepdim=True)
    own = F.pad(step.flatten(1), (1, 0)).gather(1, inner)           # [B, I] the last step to each
    path = torch.where(mask, own[:, None], 0.0).sum(-1)                               # [B, I]
    return (path[..., None] + step).flatten(1)
