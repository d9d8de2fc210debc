"""Learning to Draft on this machine: measure, record, learn, and a table beside every simpler way to choose.

    python -m gto.ltd                        leaves out/policy-draft.pt, out/policy-gto.pt and the table out/ltd.md
    python decode.py --prompt "import os" --policy ltd"""
from pathlib import Path

import torch

from gto.checkpoint import load_config, load_head, load_target
from gto.data import PROMPT, Corpus
from gto.engine import Engine
from gto.evaluate import paired, speeds
from gto.ltd.policy import Learned, save_policy
from gto.ltd.ppo import learn
from gto.ltd.replay import best_fixed, decide, drive, oracle, record, replay, seconds_by_choice
from gto.policy import AdaptiveEngine, Rule, costs_here, policy_path
from gto.tree import TreeShape
from gto.util import argument_parser, main_guard, one_thread_if_small, start, table, write_text
from gto.verify import Sampling

HIDDEN = {"cpu": 128, "cuda": 1024}       # the paper's 1024 trains for minutes instead of 20 seconds on a CPU
TRAIN, VALIDATE = 64, 16                  # training texts to learn from, to choose between rule and LTD by
LIVE = {0.0: 16, 1.0: 8}                  # held-out prompts decoded by the clock, by temperature


def make_policies(target, head, prompts, positions, costs, path):
    """-> the best fixed tree of the space as a Fixed; LTD. Saves LTD, and its gain over the rule."""
    space, learned = costs.space, Learned(costs.space, HIDDEN[target.norm.weight.device.type])
    train, others = (record(target, head, some, positions, space) for some in (prompts[:TRAIN], prompts[TRAIN:]))
    fixed, rate = best_fixed(train, seconds_by_choice(costs), space)
    seconds = seconds_by_choice(costs, learned)
    learn(learned, train, seconds, rate)
    gain = replay(others, seconds, *decide(learned, others))[0] / drive(Rule(costs), others, costs)[0] - 1
    save_policy(path, learned, gain)
    return fixed, learned


def compare(target, head, policies, costs, tree, prompts, new_tokens, name):
    """Replay held-out prompts, and decode some of them, everything in turn in one run. -> rows of a table."""
    fixed, learned = policies
    trees, rows = {"tree": tree, "best fixed": fixed.shape}, []
    for T, count in LIVE.items():
        recording = record(target, head, prompts, new_tokens, costs.space, T)
        seconds, with_ltd = seconds_by_choice(costs), seconds_by_choice(costs, learned)
        replayed = {"best fixed": replay(recording, seconds, *decide(fixed, recording))[:2],
                    "rule": drive(Rule(costs), recording, costs),
                    "LTD": replay(recording, with_ltd, *decide(learned, recording))[:2],
                    "oracle": replay(recording, seconds, *oracle(recording, seconds))[:2]}
        engines = {"ar": Engine(target, None, None, Sampling(T))}
        engines |= {key: Engine(target, head, shape, Sampling(T)) for key, shape in trees.items()}
        engines |= {key: AdaptiveEngine(target, head, policy, Sampling(T))
                    for key, policy in (("rule", Rule(costs)), ("LTD", learned))}
        results = speeds(engines, prompts[:count], new_tokens, desc=f"speed, T={T:g}")
        for key, decoded in results.items():
            tokens = sum(len(x.tokens) - 1 for x in decoded)                          # the prefill's is not timed
            ratios = [a.tokens_per_second / b.tokens_per_second for a, b in zip(decoded, results["best fixed"])]
            gain, error = paired(100 * torch.tensor(ratios), 100)
            rows.append({"T": f"{T:g}", "head": name, "": f"{key} {trees.get(key, '')}".strip(),
                         "tau": f"{tokens / sum(x.cycles for x in decoded):.2f}",
                         "tokens/s": f"{tokens / sum(x.seconds for x in decoded):.0f}",
                         "over best fixed, %": f"{gain:+.1f} ± {error:.1f}",
                         "replayed tokens/s": f"{replayed[key][0]:.0f}" if key in replayed else ""})
        rate, tau = replayed["oracle"]
        rows.append({"T": f"{T:g}", "head": name, "": "oracle", "tau": f"{tau:.2f}", "replayed tokens/s": f"{rate:.0f}"})
    return rows


def main():
    parser = argument_parser("python -m gto.ltd", __doc__, "--device")
    parser.add_argument("--out-dir", default="out", help="where train.py left target and heads (default: out)")
    parser.add_argument("--data", help="the directory that train.py took (default: data/<dataset>)")
    arguments = parser.parse_args()
    start(arguments.device)
    out = Path(arguments.out_dir)
    config = load_config(out)
    corpus = Corpus(arguments.data or f"data/{config.dataset}")
    target = load_target(out / "target.pt", arguments.device)
    one_thread_if_small(target)
    prompts = corpus.batch("train", 0, TRAIN + VALIDATE, PROMPT - 1, config.seed + 2).tolist()
    held_out, rows, new_tokens = corpus.prompt_ids(max(LIVE.values())), [], config.eval_tokens
    heads = {name: load_head(out / f"{name}.pt", target, target.norm.weight.dtype) for name in ("draft", "gto")}
    for name, head in heads.items():
        torch.manual_seed(config.seed)
        costs = costs_here(out, target, head)
        policies = make_policies(target, head, prompts, new_tokens, costs, policy_path(out / f"{name}.pt"))
        rows += compare(target, head, policies, costs, TreeShape.parse(config.tree), held_out, new_tokens, name)
    write_text(out / "ltd.md", table(rows) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main_guard(main)
