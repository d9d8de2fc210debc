"""Learning to Draft on this machine: record, learn, and a table beside simpler ways to choose, by replay.

    python -m gto.ltd                        leaves out/policy-keep.pt and the table out/ltd.md
    python -m gto.bench --policy rule --policy ltd --tree 8,5,24        the same by the clock"""
from dataclasses import replace
from math import prod

import torch

from gto.checkpoint import load_config, load_head, load_run, main_head
from gto.data import read_prompts
from gto.evaluate import paired
from gto.ltd.controllers import tuned
from gto.ltd.ppo import Learned, learn, save_policy
from gto.ltd.replay import best_fixed, drive, oracle, record, replay, seconds_by_choice
from gto.policy import Fixed, Rule, costs_here, measure, policy_path
from gto.util import FLAGS, argument_parser, main_guard, one_thread_if_small, start, table, write_whole

CHILDREN = 2, 4, 8                        # of a node; those with which the rule is fastest are LTD's
TEMPERATURES = 0.0, 1.0


def compare(target, head, costs, prompts, positions):
    """-> a Learned policy; its gain over the rule on texts that neither has seen; rows: ways to choose, on others."""
    def recordings(some, space):
        return [record(target, head, some, positions, space, T) for T in TEMPERATURES]

    eighth = max(len(prompts) // 8, 1)   # half to learn from, an eighth to choose and to tune by, the rest to report
    found = []                           # by children: Costs, recordings to tune by, to report
    for children in CHILDREN:
        space = replace(costs.space, top_k=children)
        here = costs if space == costs.space else measure(target, head, space)
        found.append((here, recordings(prompts[3 * eighth:4 * eighth], space), recordings(prompts[:3 * eighth], space)))
    costs, tuning, held_out = max(found, key=lambda here: prod(
        drive(Rule(here[0]), part, here[0]).rate for part in here[1]))
    learned, seconds = Learned(costs.space), seconds_by_choice(costs)
    learn(learned, recordings(prompts[4 * eighth:], costs.space), seconds_by_choice(costs, learned))
    gain = prod(drive(learned, part, costs).rate / drive(Rule(costs), part, costs).rate for part in tuning) ** 0.5 - 1
    rows = []
    for i, (T, part) in enumerate(zip(TEMPERATURES, held_out)):
        fixed = [(here.space.top_k, *best_fixed(parts[i], seconds_by_choice(here), here.space))
                 for here, _, parts in found]
        *tree, best = max(fixed, key=lambda each: each[-1].rate)                      # of these very texts: hindsight
        ways = {f"best fixed tree, {','.join(map(str, tree))}": best,
                "plain decoding": drive(Fixed(costs.space, 0, 0), part, costs),
                **{name: drive(make(), part, costs) for name, make in tuned(tuning[i], costs).items()},
                "oracle": replay(part, seconds, *oracle(part, seconds)),
                "rule": drive(Rule(costs), part, costs), "LTD": drive(learned, part, costs)}
        for name, result in ways.items():
            more, error = paired(100 * result.tokens / result.seconds * best.seconds / best.tokens, 100)
            rows.append({"T": f"{T:g}", "": name, "tau": result.tau, "tokens/s": f"{result.rate:.0f}",
                         "over plain decoding": f"{result.rate * costs.verify[0]:.3f}",
                         "over best fixed, %": f"{more:+.1f} ± {error:.1f}"})
    return learned, gain, rows


def main():
    parser = argument_parser("python -m gto.ltd", __doc__, *(flag for flag in FLAGS if flag != "--report"))
    parser.add_argument("--head", action="append", help="repeatable; default: decode.py's")
    arguments = parser.parse_args()
    start(arguments.device)
    out, target, _, encode, _ = load_run(arguments)
    one_thread_if_small(target)
    prompts, positions, rows = read_prompts(out / "prompts.jsonl"), load_config(out).eval_tokens, []
    prompts, paths = [encode(turns[:1]) for turns in prompts], arguments.head or [main_head(out)]
    for path, head in [(path, load_head(path, target, target.norm.weight.dtype)) for path in paths]:
        torch.manual_seed(arguments.seed)
        learned, gain, found = compare(target, head, costs_here(out, target, head), prompts, positions)
        save_policy(policy_path(path), learned, gain)
        rows += [{"head": path, **row} for row in found]
    write_whole(out / "ltd.md", table(rows) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main_guard(main)
