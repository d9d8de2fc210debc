"""How good a head is: its acceptance length tau, its speed, and the table at the end of a run.
tau is measured along texts that the target has written before: a cycle drafts at the current root, accepts the path
that the text goes, and moves on. This is what decoding does, at T>0 in distribution: the target's draws may be made in
advance, one per position, as verification meets at most one node of a position. All heads meet the same text."""
import json
import time
from typing import NamedTuple

import torch
from tqdm import tqdm

from gto.checkpoint import read_log, seconds_of
from gto.engine import Engine, cut
from gto.model import Prefix
from gto.page import watch, write_page
from gto.policy import AdaptiveEngine, Rule, costs_here
from gto.rollout import Text, target_forward
from gto.tree import TreeShape, draft_tree
from gto.util import one_thread_if_small, rank, synchronize, table, write_whole
from gto.verify import Sampling, accept

SCORE_TEMPS = {0.0: (0.2, 0.4, 0.6, 1.0), 1.0: (0.6, 1.0, 1.5)}    # to choose from, by decoding temperature
TIMED = 8                                                           # prompts decoded by the clock


def paired(a, b):
    """Mean and standard error of a - b over prompts: both decode the same ones, so their common difficulty cancels."""
    return (a - b).mean().item(), ((a - b).std() / len(a) ** 0.5).item()


class FixedText(NamedTuple):
    text: Text               # [B, T], padded on the right
    start: torch.Tensor      # [B] the first root: the token after the prompt
    end: torch.Tensor        # [B] decoding ends with the cycle that reaches it


def fixed_text(target, prompts, new_tokens, temperature, ahead, stop=(), seed=0):
    """Let the target continue the prompts (lists of ids) by `new_tokens` and the `ahead` that a last tree sees. What it
    writes behind a token of `stop` is there, but is not to be decoded."""
    torch.manual_seed(seed)
    start, more = list(map(len, prompts)), new_tokens + ahead
    engine = Engine(target, None, sampling=Sampling(temperature), batch=len(prompts), capacity=max(start) + more)
    rows = engine.complete(prompts, more)
    tokens = torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, rows)), batch_first=True).to(engine.device)
    end = [at + max(len(cut(row[at:at + new_tokens], stop)) - 1, 1) for row, at in zip(rows, start)]
    return FixedText(target_forward(target, tokens), *torch.tensor([start, end], device=engine.device))


def accepted_path(tree, text, at):
    """What texts [n, T] accept of a tree behind their token at [n, 1]: nodes [n, N], padded with 0; how many [n]."""
    says = (at + tree.depth + 1).clamp(max=text.shape[1] - 1)                         # [n, N] a leaf's is not looked at
    return accept(tree, text.gather(1, says), tree.tokens.shape[1])[:2]


@torch.no_grad()
def replay_text(fixed, draft):
    """Decode all texts. draft(rows [n], length [n]) -> a Tree behind the token at `length` of each of these texts.
    Returns tau [B]: tokens emitted per cycle, the target's own one counted."""
    length, cycles = fixed.start.clone(), torch.zeros_like(fixed.start)
    while len(rows := (length < fixed.end).nonzero().squeeze(1)):
        tree = draft(rows, length[rows])
        length[rows] += accepted_path(tree, fixed.text.tokens[rows], length[rows, None])[1] + 1
        cycles[rows] += 1
    return (length - fixed.start) / cycles.clamp(min=1)


def drafting(head, fixed, shape, score_temp):
    """-> draft(rows, length, shape=shape), which drafts a Tree behind the token at `length` of each of these texts."""
    with torch.no_grad():
        hidden, kv = head.read(fixed.text.features, fixed.text.tokens)
    return lambda rows, length, shape=shape: draft_tree(
        head, hidden[rows, length - 1], fixed.text.tokens[rows, length], Prefix(kv, length, rows), shape, score_temp)


def tau(head, fixed, shape, score_temp):
    """Acceptance length [B] of a head's trees."""
    return replay_text(fixed, drafting(head, fixed, shape, score_temp))


def best_score_temp(head, fixed, shape, temperatures):
    """The temperature of the scores with the largest mean tau."""
    return max(temperatures, key=lambda s: tau(head, fixed, shape, s).mean().item())


def diagnosis(head, fixed, shape, score_temp, bins=10):
    """Acceptance length [B]; the paper's diagnosis: the shares of cycles in which the greedy path, as deep as the tree,
    is not wholly in the tree, in which the tree is accepted just as far as that path, and to each depth, [depth];
    calibration: [(mean probability of a node's path by the head, share accepted)] by tenths of the former."""
    draft, chain = drafting(head, fixed, shape, score_temp), TreeShape(1, shape.depth, shape.depth)
    cycles, nodes = [], []

    def tree_and_path(rows, length):
        tree, path = draft(rows, length), draft(rows, length, chain)
        (chosen, accepted), (_, alone) = (
            accepted_path(drafted, fixed.text.tokens[rows], length[:, None]) for drafted in (tree, path))
        kept_of_path = accepted_path(tree, path.tokens, 0)[1]
        reached = accepted[:, None] > torch.arange(shape.depth, device=accepted.device)             # [n, depth]
        cycles.append((kept_of_path < shape.depth, accepted == alone, reached))
        kept = torch.zeros_like(tree.scores).scatter(1, chosen, 1.0)                                # [n, N]
        nodes.append(torch.stack([tree.scores.exp(), kept])[:, :, 1:].flatten(1))
        return tree

    lengths = replay_text(fixed, tree_and_path)
    promised, kept = torch.cat(nodes, dim=1)
    tenth = (promised * bins).long().clamp(max=bins - 1)
    return (lengths, *(torch.cat(shares).float().mean(0).tolist() for shares in zip(*cycles)),
            [(promised[tenth == i].mean().item(), kept[tenth == i].mean().item()) for i in tenth.unique()])


class Decoded(NamedTuple):
    """One prompt, decoded by the clock. The prefill, from which the first token comes, is not timed."""
    tokens: list
    seconds: float
    cycles: int

    @property
    def tau(self):
        return (len(self.tokens) - 1) / max(self.cycles, 1)

    @property
    def tokens_per_second(self):
        return overall([self])


def overall(decoded):
    """Tokens a second over all of them."""
    return sum(len(each.tokens) - 1 for each in decoded) / max(sum(each.seconds for each in decoded), 1e-9)


def timed(engine, prompt, new_tokens, stop=()):
    """Decode one prompt to `new_tokens` tokens or one of `stop`. -> Decoded, its last cycle counted in full."""
    new = engine.prefill([prompt])
    tokens, stream, cycles = list(new), engine.cycles(), 0
    began = time.perf_counter()
    while len(tokens) < new_tokens and not any(token in stop for token in new):
        new = next(stream)[0]
        tokens += new
        cycles += 1
    seconds = time.perf_counter() - began
    synchronize(engine.device)                         # a GPU has begun a cycle more; it must not disturb what follows
    return Decoded(tokens, seconds, cycles)


def speeds(engines, prompts, new_tokens, stop=(), desc="speed"):
    """Decode by {name: Engine} of batch 1 in turn, which share bad moments, and the text. -> {name: [Decoded]}"""
    result, seed = {name: [] for name in engines}, torch.initial_seed()
    for number, prompt in enumerate(tqdm(prompts[:1] + prompts, desc=desc, unit="prompt", disable=rank() > 0)):
        for name, engine in engines.items():
            torch.manual_seed(seed + number)
            result[name].append(timed(engine, prompt, new_tokens, stop))
    return {name: decoded[1:] for name, decoded in result.items()}                    # the first is the warm-up


def compare_tau(config, target, heads, prompts, others, stop):
    """Acceptance lengths of {name: [a head per seed]}, each with the score temperature that the `others` choose.
    -> rows by (T, name); taus by (T, name), [seeds, prompts]; what results.json holds besides."""
    shape, new_tokens, rows, taus = TreeShape.parse(config.tree), config.eval_tokens, {}, {}
    main = list(heads.values())[-1][0]
    results = {"prompts": len(prompts), "by_depth": {}, "calibration": {}}
    for T, temperatures in SCORE_TEMPS.items():
        test = fixed_text(target, prompts, new_tokens, T, shape.depth, stop)
        tune = fixed_text(target, others, new_tokens // 2, T, shape.depth, stop, seed=1)
        rows[T, "ar"] = {"T": f"{T:g}", "method": "ar", "tau": 1.0}
        depths = results["by_depth"][f"{T:g}"] = {}
        for name, trained in tqdm(heads.items(), desc=f"tau, T={T:g}", unit="method"):
            best = [best_score_temp(head, tune, shape, temperatures) for head in trained]
            found, *shares, _ = zip(*(diagnosis(head, test, shape, s) for head, s in zip(trained, best)))
            taus[T, name] = torch.stack(found)                                        # [seeds, prompts]
            mean, error = paired(taus[T, name].mean(0), 0.0)
            pruned, matched, depths[name] = (torch.tensor(share).mean(0).tolist() for share in shares)
            rows[T, name] = {"T": f"{T:g}", "method": name, "tau": mean, "±": error,
                             "by seed": [round(each, 3) for each in taus[T, name].mean(1).tolist()],
                             "score temp.": best, "at score temp. 1": tau(trained[0], test, shape, 1.0).mean().item(),
                             "path pruned": f"{pruned:.0%}", "accepted = path's": f"{matched:.0%}"}
        results["calibration"][f"{T:g}"] = {s: diagnosis(main, tune, shape, s)[-1] for s in temperatures}
        if T == 0:                                                                    # is speculation lossless?
            plain = [row[len(prompt):][:new_tokens] for row, prompt in zip(test.text.tokens.tolist(), prompts)]
            room = max(map(len, prompts)) + new_tokens
            engine = Engine(target, main, shape, batch=len(prompts), capacity=room)
            written = [row[-new_tokens:] for row in engine.complete(prompts, new_tokens)]
            results["greedy_equal"] = sum(map(list.__eq__, written, plain))
            results["distinct_tokens"] = sum(len(set(row)) for row in plain) / len(plain)
    return rows, taus, results


def compare_speed(target, heads, out, prompts, new_tokens, stop, rows):
    """Add to the rows: tokens a second by the rule, over those of plain decoding; seconds of training."""
    room, costs = max(map(len, prompts)) + new_tokens + 16, costs_here(out, target, heads["draft"][0])
    for T in SCORE_TEMPS:
        engines = {"ar": Engine(target, None, sampling=Sampling(T), capacity=room)}
        for name, (head, *_) in heads.items():
            engines[name] = AdaptiveEngine(target, head, Rule(costs), Sampling(T), room)
        decoded = speeds(engines, prompts, new_tokens, stop, desc=f"speed, T={T:g}")
        rates = {name: overall(runs) for name, runs in decoded.items()}
        for name, rate in rates.items():
            rows[T, name] |= {"tokens/s": round(rate), "speed-up": round(rate / rates["ar"], 2)}
            if name != "ar":
                rows[T, name]["training, s"] = round(seconds_of(out, name))


def report(config, target, heads, out, prompts, encoding, stop=()):
    """The comparison at the end of a run; prompts: lists of ids, every fifth chooses score temperatures; stop: tokens
    that end an answer. -> Markdown, also in out/table.md, and beside it results.json and the page report.html."""
    others, prompts, new_tokens = prompts[::5], [p for i, p in enumerate(prompts) if i % 5], config.eval_tokens
    rows, taus, results = compare_tau(config, target, heads, prompts, others, stop)
    one_thread_if_small(target)
    compare_speed(target, heads, out, prompts[:TIMED], new_tokens, stop, rows)
    rows = list(rows.values())
    differences = {f"{a} - {b}": {f"T={T:g}": paired(taus[T, a].mean(0), taus[T, b].mean(0)) for T in SCORE_TEMPS}
                   for a in list(heads)[1:] for b in ("draft", "control") if a != b}
    lines = [f"tau with tree {config.tree} ± standard error over {results['prompts']} held-out prompts x {new_tokens}"
             f" tokens, mean of {config.seeds} seeds, each head with its best score temperature. Path: the head's"
             f" greedy path. Speed: batch 1, trees chosen by the rule, {TIMED} prompts in all.",
             f"Greedy output equal to plain greedy decoding: {results['greedy_equal']} of {results['prompts']} texts,"
             f" with {results['distinct_tokens']:.0f} distinct tokens each.",
             *(f"{pair}: " + ", ".join(f"{mean:+.3f} ± {error:.3f}{'*' * (abs(mean) > 2 * error)} at {T}"
                                       for T, (mean, error) in by_T.items()) + "."
               for pair, by_T in differences.items()),
             "* more than two standard errors."]
    text = "\n".join([table([dict.fromkeys(rows[1], "") | row for row in rows]), "", *lines])
    results |= {"rows": rows, "differences": differences}
    write_whole(out / "results.json", json.dumps(results, indent=1) + "\n")
    write_whole(out / "table.md", text + "\n")
    main, capacity = list(heads.values())[-1][0], len(prompts[0]) + new_tokens
    engine = Engine(target, main, TreeShape.parse(config.tree), capacity=capacity)
    decode = watch(engine, prompts[0], encoding, new_tokens, stop)
    write_page(out / "report.html", f"A run: {out.name}", decode, lines, log=read_log(out), **results)
    return text
