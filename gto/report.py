"""The table at the end of a run: what each step bought, next to the control that matters. Also as out/results.json."""
import json

import torch
from tqdm import tqdm

from gto.data import write_text
from gto.engine import Engine, one_thread_on_cpu
from gto.evaluate import acceptance, paired, speeds
from gto.fixed_text import SCORE_TEMPS, best_score_temp, tau_and_diagnosis, write, written
from gto.summary import markdown, mean
from gto.tree import TreeShape
from gto.verify import Sampling

SPEED_TREES = ("1,3,3", "2,2,3", "2,3,6", "2,4,8", "3,4,8")   # beside the trained one: on a CPU small trees win
CHOOSING, TIMED = 2, 8                               # prompts to choose the fastest tree on, other ones to time it on


def seconds_of(out, stage):
    with open(out / "log.jsonl") as f:
        lines = [json.loads(line) for line in f]
    return [line["seconds"] for line in lines if line.get("stage") == stage and line.get("finished")][-1]


def matched_steps(out, config, name):
    """Token-level steps that take as long as this run of GTO took, at the pace of phase I."""
    return max(1, round(seconds_of(out, name) / seconds_of(out, "draft") * config.head_steps))


def table(config, target, heads, corpus, out):
    """heads {"draft" | "control" | "gto": [a head per seed]} -> Markdown, also in out/table.md and out/results.json."""
    shape, new_tokens = TreeShape.parse(config.tree), config.eval_tokens
    prompts = corpus.prompt_ids(config.eval_prompts * 5 // 4)
    others, prompts = prompts[::5], [prompt for i, prompt in enumerate(prompts) if i % 5]   # score temperatures; the rest
    results = {"methods": {name: {} for name in ("ar", *heads)}, "train_seconds": {
        name: seconds_of(out, name) for name in ("target", *heads)}, "tree": config.tree, "prompts": len(prompts)}
    taus = {}
    for T in SCORE_TEMPS:
        test = write(target, prompts, new_tokens, T, shape.levels)
        tune = write(target, others, new_tokens // 2, T, shape.levels, seed=1)
        if T == 0:
            results["distinct_tokens"], results["greedy_equal"] = losslessness(target, heads["gto"][0], test, prompts,
                                                                               shape, new_tokens)
        figures = {"ar": {"tau": 1.0, "tau_se": 0.0}}
        for name, trained in tqdm(heads.items(), desc=f"tau, T={T:g}", unit="method"):
            figures[name], taus[name, T] = acceptance_of(trained, test, tune, shape, T)
        speed = speed_of(target, {name: trained[0] for name, trained in heads.items()}, prompts, T, config)
        for name, entry in figures.items():
            results["methods"][name][f"T{T:g}"] = entry | speed[name]
    results["differences"] = {
        f"{a} - {b}": {f"T{T:g}": paired(taus[a, T].mean(0), taus[b, T].mean(0)) for T in SCORE_TEMPS}
        for a, b in (("control", "draft"), ("gto", "draft"), ("gto", "control"))}
    text = as_markdown(results, config)
    write_text(out / "results.json", json.dumps(results, indent=1) + "\n")
    write_text(out / "table.md", text + "\n")
    return text


def losslessness(target, head, test, prompts, shape, new_tokens):
    """Decode with trees what plain decoding has written. -> distinct tokens of a text, texts that are equal."""
    plain = written(test, new_tokens)
    _, outputs = acceptance(target, head, prompts, shape, 0.0, new_tokens)
    return mean([len(set(row)) for row in plain]), sum(map(list.__eq__, outputs, plain))


def acceptance_of(trained, test, tune, shape, T):
    """One method's heads, a seed each, on the same texts. -> figures, tau [seeds, prompts]."""
    taus, diagnoses, score_temps = [], [], []
    for head in trained:
        score_temps.append(best_score_temp(head, tune, shape, SCORE_TEMPS[T])[0])
        tau, *diagnosis = tau_and_diagnosis(head, test, shape, score_temps[-1])
        taus.append(tau), diagnoses.append(diagnosis)
    tau = torch.stack(taus)
    pruned, matched = torch.tensor(diagnoses).mean(0).tolist()
    return {"tau": tau.mean().item(), "tau_se": (tau.mean(0).std() / tau.shape[1] ** 0.5).item(),
            "tau_by_seed": tau.mean(1).tolist(), "score_temp": score_temps, "prune_rate": pruned, "match_rate": matched}, tau


def speed_of(target, heads, prompts, T, config):
    """Batch 1, all methods in turn on the same prompts, so that they share the machine's good and bad moments.

    Each head uses its fastest tree, chosen on other prompts. -> {method: tokens_per_second, speedup, fastest_tree}
    """
    one_thread_on_cpu(target.norm.weight.device)
    capacity = max(map(len, prompts)) + config.eval_tokens + 16

    def engine(head, tree):
        return Engine(target, head, tree and TreeShape.parse(tree), Sampling(T), capacity=capacity)

    plain = {("ar", None): engine(None, None)}
    trees = list(dict.fromkeys((*SPEED_TREES, config.tree)))
    tried = speeds({(name, tree): engine(head, tree) for name, head in heads.items() for tree in trees},
                   prompts[:CHOOSING], config.eval_tokens // 2, desc=f"fastest tree, T={T:g}")
    fastest = {name: max(trees, key=lambda tree: tried[name, tree].mean()) for name in heads}
    measured = speeds(plain | {(name, fastest[name]): engine(head, fastest[name]) for name, head in heads.items()},
                      prompts[CHOOSING:CHOOSING + TIMED], config.eval_tokens, desc=f"speed, T={T:g}")
    return {name: {"tokens_per_second": rate.median().item(),
                   "speedup": (rate / measured["ar", None]).median().item(), "fastest_tree": tree}
            for (name, tree), rate in measured.items()}


def as_markdown(results, config):
    rows = []
    for name, by_temperature in results["methods"].items():
        for T, entry in by_temperature.items():
            seeds, is_head = entry.get("tau_by_seed", [0]), "score_temp" in entry
            rows.append([T[1:], name, f"{entry['tau']:.3f} ± {entry['tau_se']:.3f}" if is_head else "1",
                         f"{min(seeds):.3f} .. {max(seeds):.3f}" if len(seeds) > 1 else "",
                         f"{entry['prune_rate']:.0%}" if is_head else "", f"{entry['match_rate']:.0%}" if is_head else "",
                         entry["fastest_tree"] or "", f"{entry['tokens_per_second']:.0f}", f"{entry['speedup']:.2f}",
                         f"{results['train_seconds'][name]:.0f}" if is_head else ""])
    rows.sort(key=lambda row: row[0])
    lines = [f"tau: acceptance length with tree {config.tree}, {results['prompts']} held-out prompts x {config.eval_tokens}"
             f" tokens, mean of {config.seeds} seeds ± standard error over prompts, each head with its best score"
             " temperature. Path: the head's greedy path. Speed: batch 1, the head's fastest tree, median over"
             f" {TIMED} prompts.\n",
             markdown(["T", "method", "tau", "seeds", "path pruned", "accepted = path's", "fastest tree", "tokens/s",
                       "speed-up", "training, s"], rows),
             f"\nGreedy output equal to plain greedy decoding: {results['greedy_equal']} of {results['prompts']} texts."
             f" Distinct tokens in {config.eval_tokens} greedy ones: {results['distinct_tokens']:.0f}."]
    for pair, difference in results["differences"].items():
        lines.append(f"{pair}: " + ", ".join(f"{mean:+.3f} ± {error:.3f} at T={T[1:]}"
                                             for T, (mean, error) in difference.items()) + ".")
    gains = [T[1:] for T, (mean, error) in results["differences"]["gto - control"].items() if mean > 2 * error]
    lines.append("GTO beats the continuation that took as long at T=" + " and T=".join(gains) + "." if gains else
                 "GTO does not beat the continuation that took as long (by two standard errors) at either temperature.")
    return "\n".join(lines)
