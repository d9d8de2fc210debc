"""Learning to Draft on this machine: record, learn, and a table beside simpler ways to choose, by replay.

    python -m gto.ltd                        leaves out/policy-draft.pt, out/policy-gto.pt and the table out/ltd.md
    python -m gto.bench --policy rule --policy ltd --tree 8,5,24        the same by the clock"""
from dataclasses import replace
from math import prod

import torch

from gto.checkpoint import load_config, load_head, load_run
from gto.data import read_prompts
from gto.evaluate import paired
from gto.ltd.controllers import tuned
from gto.ltd.ppo import Learned, learn, save_policy
from gto.ltd.replay import best_fixed, drive, oracle, record, replay, seconds_by_choice
from gto.policy import Fixed, Rule, costs_here, measure, policy_path
from gto.util import FLAGS, argument_parser, main_guard, start, table, write_whole

HIDDEN = {"cpu": 64, "cuda": 1024}        # the paper's 1024 trains for minutes instead of one on a CPU
CHILDREN = 2, 4, 8                        # of a node; those with which the rule is fastest are LTD's
TEMPERATURES = 0.0, 1.0


def choose_space(target, head, costs, prompts, positions):
    """-> {children: Costs}, the fastest children by the rule, for the geometric mean of both temperatures, first."""
    by_children, rates = {}, {}
    for children in CHILDREN:
        space = replace(costs.space, top_k=children)
        here = by_children[children] = costs if space == costs.space else measure(target, head, space)
        parts = [record(target, head, prompts, positions, space, T) for T in TEMPERATURES]
        rates[children] = prod(drive(Rule(here), part, here).rate for part in parts)
    return {children: by_children[children] for children in sorted(rates, key=rates.get, reverse=True)}


def baselines(target, head, by_children, tune, part, prompts, positions, T):
    """What else there is, on the texts of the recording `part` -> {name: Replayed}, the best fixed tree first."""
    found, (costs, *_) = {}, by_children.values()
    for here in by_children.values():
        same = part if here is costs else record(target, head, prompts, positions, here.space, T)
        fixed, rate = best_fixed(same, seconds_by_choice(here), here.space)           # of these very texts: hindsight
        found[rate] = {f"best fixed tree, {here.space.top_k},{fixed.depth},{fixed.nodes}": drive(fixed, same, here)}
    seconds = seconds_by_choice(costs)
    return found[max(found)] | {
        "plain decoding": drive(Fixed(costs.space, 0, 0), part, costs),
        **{name: drive(make(), part, costs) for name, make in tuned(tune, costs).items()},
        "oracle": replay(part, seconds, *oracle(part, seconds))}


def compare(target, head, costs, prompts, positions):
    """-> a Learned policy; its gain over the rule on texts that neither has seen; rows: ways to choose, on others."""
    eighth = max(len(prompts) // 8, 1)   # half to learn from, an eighth to choose and to tune by, the rest to report
    by_children = choose_space(target, head, costs, prompts[3 * eighth:4 * eighth], positions)
    costs, rows = next(iter(by_children.values())), []
    train, tuning, held_out = ([record(target, head, some, positions, costs.space, T) for T in TEMPERATURES]
                               for some in (prompts[4 * eighth:], prompts[3 * eighth:4 * eighth], prompts[:3 * eighth]))
    learned = Learned(costs.space, HIDDEN[target.norm.weight.device.type])
    learn(learned, train, seconds_by_choice(costs, learned))
    gain = prod(drive(learned, part, costs).rate / drive(Rule(costs), part, costs).rate for part in tuning) ** 0.5 - 1
    for T, part, tune in zip(TEMPERATURES, held_out, tuning):
        ways = baselines(target, head, by_children, tune, part, prompts[:3 * eighth], positions, T)
        ways |= {"rule": drive(Rule(costs), part, costs), "LTD": drive(learned, part, costs)}
        best, *_ = ways.values()
        for name, result in ways.items():
            more, error = paired(100 * result.tokens / result.seconds * best.seconds / best.tokens, 100)
            rows.append({"T": f"{T:g}", "": name, "tau": result.tau, "tokens/s": f"{result.rate:.0f}",
                         "over plain decoding": f"{result.rate * costs.verify[0]:.3f}",
                         "over best fixed, %": f"{more:+.1f} ± {error:.1f}"})
    return learned, gain, rows


def main():
    parser = argument_parser("python -m gto.ltd", __doc__, *(flag for flag in FLAGS if flag != "--report"))
    parser.add_argument("--head", action="append", help="repeatable; default: draft.pt and gto.pt")
    arguments = parser.parse_args()
    start(arguments.device)
    out, target, _, encode, _ = load_run(arguments)
    config, rows = load_config(out), []
    prompts = [encode(turns[:1]) for turns in read_prompts(out / "prompts.jsonl")]
    heads = {path: load_head(path, target, target.norm.weight.dtype)
             for path in arguments.head or (f"{out}/draft.pt", f"{out}/gto.pt")}
    for path, head in heads.items():
        torch.manual_seed(arguments.seed)
        learned, gain, found = compare(target, head, costs_here(out, target, head), prompts, config.eval_tokens)
        save_policy(policy_path(path), learned, gain)
        rows += [{"head": path, **row} for row in found]
    write_whole(out / "ltd.md", table(rows) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main_guard(main)
