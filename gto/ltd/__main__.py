"""Learning to Draft on this machine: measure, record, learn, and a table beside every simpler way to choose.

    python -m gto.ltd                        leaves out/policy-draft.pt, out/policy-gto.pt and the table out/ltd.md
    python decode.py --prompt "import os" --adaptive"""
from pathlib import Path

import torch

from gto.checkpoint import load_config, load_head, load_target
from gto.data import PROMPT, Corpus
from gto.engine import Engine
from gto.evaluate import paired, speeds
from gto.ltd.engine import AdaptiveEngine
from gto.ltd.policy import Learned, Rule, Space, policy_path, save_policy
from gto.ltd.ppo import learn
from gto.ltd.replay import best_fixed, decide, measure, oracle, record, replay
from gto.tree import TreeShape
from gto.util import argument_parser, main_guard, one_thread_if_small, start, table, write_text
from gto.verify import Sampling

# On a CPU small trees win, or none: one token alone is much cheaper than two. On a GPU dozens of nodes cost little.
SPACES = {"cpu": Space(2, 8, (0, 1, 2, 3, 4, 6, 8, 12, 16)), "cuda": Space(10, 8, (8, 16, 24, 32, 48, 64, 96, 128))}
HIDDEN = {"cpu": 128, "cuda": 1024}       # the paper's 1024 trains for minutes instead of 20 seconds on a CPU
MEASURE, TRAIN, VALIDATE = 27, 64, 16     # training texts to time, to learn from, to choose between rule and LTD by
LIVE = {0.0: 16, 1.0: 8}                  # held-out prompts decoded by the clock, by temperature


def make_policies(target, head, prompts, positions, path):
    """-> {name: (policy, the costs of its cycles)}; saves the faster one of rule and LTD."""
    device = target.norm.weight.device.type
    space, learned = SPACES[device], Learned(SPACES[device], HIDDEN[device])
    machine, costs = measure(target, head, learned, prompts[:MEASURE], positions)
    train, others = (record(target, head, some, positions, space) for some in (prompts[:TRAIN], prompts[TRAIN:]))
    fixed, rate = best_fixed(train, machine, space)
    rule = Rule(space, costs, rate)
    learn(learned, train, costs, rate)
    save_policy(path, max(learned, rule, key=lambda policy: replay(others, costs, *decide(policy, others))[0]))
    return {"best fixed": (fixed, machine), "rule": (rule, costs), "LTD": (learned, costs)}


def compare(target, head, policies, tree, prompts, new_tokens, name):
    """Replay held-out prompts, and decode some of them, everything in turn in one run. -> rows of a table."""
    fixed, machine = policies["best fixed"]
    recording, rows = record(target, head, prompts, new_tokens, fixed.space), []
    replayed = {key: f"{replay(recording, costs, *decide(policy, recording))[0]:.0f}"
                for key, (policy, costs) in policies.items()}
    trees = {"default tree": TreeShape.default(target.norm.weight.device), "tree": tree, "best fixed": fixed.shape}
    for T, count in LIVE.items():
        engines = {"ar": Engine(target, None, None, Sampling(T))}
        engines |= {key: Engine(target, head, shape, Sampling(T)) for key, shape in trees.items()}
        engines |= {key: AdaptiveEngine(target, head, policies[key][0], Sampling(T)) for key in ("rule", "LTD")}
        results = speeds(engines, prompts[:count], new_tokens, desc=f"speed, T={T:g}")
        for key, decoded in results.items():
            tokens = sum(len(x.tokens) - 1 for x in decoded)                          # the prefill's is not timed
            ratios = [a.tokens_per_second / b.tokens_per_second for a, b in zip(decoded, results["best fixed"])]
            gain, error = paired(100 * torch.tensor(ratios), 100)
            rows.append({"T": f"{T:g}", "head": name, "": f"{key} {trees.get(key, '')}".strip(),
                         "tau": f"{tokens / sum(x.cycles for x in decoded):.2f}",
                         "tokens/s": f"{tokens / sum(x.seconds for x in decoded):.0f}",
                         "over best fixed, %": f"{gain:+.1f} ± {error:.1f}",
                         "replayed tokens/s": replayed.get(key, "") if T == 0 else ""})
        if T == 0:
            rate, tau, _ = replay(recording, machine, *oracle(recording, machine))
            rows.append({"T": "0", "head": name, "": "oracle", "tau": f"{tau:.2f}", "replayed tokens/s": f"{rate:.0f}"})
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
        policies = make_policies(target, head, prompts, new_tokens, policy_path(out / f"{name}.pt"))
        rows += compare(target, head, policies, TreeShape.parse(config.tree), held_out, new_tokens, name)
    write_text(out / "ltd.md", table(rows) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main_guard(main)
