"""From what the benchmark measured to rows of numbers, and from rows to Markdown."""
import torch

from gto.errors import UserError


def summary(results, plain, levels):
    """One method's results (see `gto.bench.measure`) at one temperature -> a row of the report.

    levels   of its tree; 0: plain decoding
    Spreads are [first quartile, median, third quartile] over prompts. tau is pooled: all tokens by all cycles. The
    ms of a cycle and of its parts are medians over cycles, the parts' from the dissected pass: a `rest` below zero is
    noise.
    The paper's diagnosis is by cycle (see `gto.diagnose.dissect`): `pruned`, the share in which the greedy path is not
    in the tree to its full depth; `matched`, the share in which the tree's accepted path is just what the greedy path
    alone would have had accepted, neither more (another branch) nor less (it was pruned); the acceptance length of the
    greedy path alone, and of the tree in the same cycles, both with the token that the target adds.
    """
    pairs = [(mine, other) for mine, other in zip(results, plain) if mine["accepted"] and other["accepted"]]
    if not pairs:
        raise UserError("every answer ended with its first token: nothing to measure; choose other prompts")
    mine = [result for result, _ in pairs]
    accepted = [n for result in mine for n in result["accepted"]]
    inside = {name: [x for result in mine for x in result["inside"][name]] for name in mine[0]["inside"]}
    cycle, draft, verify = (median(values) for values in (
        [1e3 * x for result in mine for x in result["seconds"]], inside["draft"], inside["verify"]))
    row = {"prompts": len(mine), "cycles": len(accepted), "tokens": sum(r["emitted"] for r in mine),
           "tau": sum(r["emitted"] for r in mine) / len(accepted),
           "tau_by_prompt": quartiles([r["emitted"] / len(r["accepted"]) for r in mine]),
           "tokens_per_s": quartiles([rate(r) for r in mine]),
           "speedup": quartiles([rate(a) / rate(b) for a, b in pairs]),
           "cycle_ms": cycle, "draft_ms": draft, "verify_ms": verify, "rest_ms": cycle - draft - verify,
           "accepted": [accepted.count(n) / len(accepted) for n in range(levels + 1)]}
    if levels:
        row |= {"pruned": mean([kept < levels for kept in inside["kept"]]),
                "matched": mean([tree == path for tree, path in zip(inside["tree"], inside["greedy"])]),
                "tau_greedy_path": 1 + mean(inside["greedy"]), "tau_same_cycles": 1 + mean(inside["tree"])}
    return row


def rate(result):
    return result["emitted"] / sum(result["seconds"])


def mean(values):
    return sum(values) / len(values)


def quartiles(values):
    values, at = torch.tensor(values, dtype=torch.float64), torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    return values.quantile(at).tolist()


def median(values):
    return quartiles(values)[1]


def tables(report):
    """The report of `gto.bench.benchmark` as Markdown."""
    rows = report["rows"]
    speed = [[f"{row['T']:g}", row["method"], spread(row["tau"], row["tau_by_prompt"]),
              spread(row["tokens_per_s"][1], row["tokens_per_s"], 0),
              spread(row["speedup"][1], row["speedup"]) if "pruned" in row else "1",
              *(f"{row[part]:.2f}" for part in ("cycle_ms", "draft_ms", "verify_ms", "rest_ms"))] for row in rows]
    depths = range(max(len(row["accepted"]) for row in rows))
    trees = [[f"{row['T']:g}", row["method"], f"{row['pruned']:.0%}", f"{row['matched']:.0%}",
              f"{row['tau_greedy_path']:.2f}", f"{row['tau_same_cycles']:.2f}",
              *(f"{row['accepted'][n]:.0%}" if n < len(row["accepted"]) else "" for n in depths)]
             for row in rows if "pruned" in row]
    return "\n".join([
        f"{report['device']}, {report['dtype']}, torch {report['torch']}, batch 1: {report['questions']} questions,"
        f" {rows[0]['prompts']} answers of up to {report['max_new_tokens']} tokens. In brackets the quartiles over"
        " answers.\n",
        markdown(["T", "method", "tau", "tokens/s", "speed-up", "cycle, ms", "draft", "verify", "rest"], speed),
        "\nThe greedy path against the tree, and the share of cycles by drafts accepted.\n",
        markdown(["T", "method", "path pruned", "accepted = path's", "tau, path alone", "tau, tree", *map(str, depths)],
                 trees), *losslessness(report)])


def losslessness(report):
    """Lines on greedy equality; none if T=0 was not run."""
    compared = [row for row in report["rows"] if "equal" in row and row["method"] != "plain"]
    if not compared:
        return []
    answers, equal = report["answers"] * len(compared), sum(row["equal"] for row in compared)
    lines = [f"\nGreedy answers equal to plain decoding's: {equal} of {answers}. Distinct"
             f" tokens in a plain one: {report['distinct_tokens']:.0f} of up to {report['max_new_tokens']}."]
    return lines + [f"* {d['method']}: question {d['question']}, turn {d['turn']}, token {d['position']}, all from 0:"
                    f" {d['here']} instead of {d['plain']}, gap of the target's top two logits {d['gap']:.2g}"
                    for d in report["divergences"]]


def spread(value, quartiles, digits=2):
    return f"{value:.{digits}f} ({quartiles[0]:.{digits}f} .. {quartiles[2]:.{digits}f})"


def markdown(header, rows):
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])
