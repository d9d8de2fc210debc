"""Learning to Draft on this machine: record, learn, and a table beside simpler ways to choose, by replay.

    python -m gto.ltd                        leaves out/policy-draft.pt, out/policy-gto.pt and the table out/ltd.md
    python -m gto.bench --policy rule --policy ltd --tree 8,5,24        the same by the clock"""
from pathlib import Path

import torch

from gto.checkpoint import load_config, load_head, load_target
from gto.data import PROMPT, Corpus
from gto.evaluate import paired
from gto.ltd.ppo import Learned, learn, save_policy
from gto.ltd.replay import best_fixed, decide, drive, oracle, record, replay, seconds_by_choice
from gto.policy import Rule, costs_here, policy_path
from gto.util import argument_parser, main_guard, one_thread_if_small, start, table, write_whole

HIDDEN = {"cpu": 128, "cuda": 1024}       # the paper's 1024 trains for minutes instead of 20 seconds on a CPU
TRAIN, VALIDATE, TEST = 64, 16, 48        # texts to learn from, to choose between rule and LTD by; held-out prompts


def compare(target, head, costs, prompts, held_out, positions, path):
    """Learn from greedy texts; save the policy, its gain over the rule. -> rows: ways to choose, on held-out texts."""
    space, rows, seconds = costs.space, [], seconds_by_choice(costs)
    train, others = (record(target, head, some, positions, space) for some in (prompts[:TRAIN], prompts[TRAIN:]))
    learned = Learned(space, HIDDEN[target.norm.weight.device.type])
    asked = seconds_by_choice(costs, learned)
    learn(learned, train, asked, best_fixed(train, seconds, space)[1])
    gain = replay(others, asked, *decide(learned, others)).rate / drive(Rule(costs), others, costs).rate - 1
    save_policy(path, learned, gain)
    for T in (0.0, 1.0):
        recording = record(target, head, held_out, positions, space, T)
        fixed, _ = best_fixed(recording, seconds, space)                              # of these very texts: hindsight
        best = replay(recording, seconds, *decide(fixed, recording))
        for name, result in ((f"best fixed, {space.top_k},{fixed.depth},{fixed.nodes}", best),
                             ("rule", drive(Rule(costs), recording, costs)),
                             ("LTD", replay(recording, asked, *decide(learned, recording))),
                             ("oracle", replay(recording, seconds, *oracle(recording, seconds)))):
            gain, error = paired(100 * (result.tokens / result.seconds) / (best.tokens / best.seconds), 100)
            rows.append({"T": f"{T:g}", "head": path.stem.removeprefix("policy-"), "": name, "tau": result.tau,
                         "tokens/s": f"{result.rate:.0f}",
                         "over plain decoding": f"{result.rate * costs.verify[0]:.2f}",
                         "over best fixed, %": f"{gain:+.1f} ± {error:.1f}"})
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
    held_out, rows = corpus.prompt_ids(TEST), []
    heads = {path: load_head(path, target, target.norm.weight.dtype) for path in (out / "draft.pt", out / "gto.pt")}
    for path, head in heads.items():
        torch.manual_seed(config.seed)
        costs = costs_here(out, target, head)
        rows += compare(target, head, costs, prompts, held_out, config.eval_tokens, policy_path(path))
    write_whole(out / "ltd.md", table(rows) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main_guard(main)
