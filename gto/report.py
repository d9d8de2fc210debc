"""The tables at the end of a run: what each step bought, next to the control that matters."""
import json

import torch
from tqdm import tqdm

from gto.engine import Engine, one_thread_on_cpu
from gto.evaluate import acceptance, paired, speeds
from gto.trainer import append_log
from gto.tree import TreeShape
from gto.verify import Sampling

SPEED_TREES = ("1,2,2", "2,2,3", "2,3,6", "1,5,5")   # beside the trained one: on a CPU small trees win


def records(out, **wanted):
    with open(out / "log.jsonl") as f:
        lines = [json.loads(line) for line in f]
    return [line for line in lines if all(line.get(k) == v for k, v in wanted.items())]


def matched_steps(out, config, seed):
    """Token-level steps that take as long as this seed's GTO took, at the pace of phase I."""
    phase_one = records(out, stage="head", finished=True)[-1]
    gto = records(out, stage=f"gto-{seed}", finished=True)[-1]
    return max(1, round(gto["seconds"] / phase_one["seconds"] * config.head_steps))


def seconds_of(out, method, config):
    if method == "phase I":
        return records(out, stage="head", finished=True)[-1]["seconds"]
    runs = [records(out, stage=f"{method.lower()}-{config.seed + i}", finished=True)[-1] for i in range(config.seeds)]
    return sum(run["seconds"] for run in runs) / len(runs)


def tables(config, target, heads, corpus, out):
    """heads {method: [a head per seed]} -> Markdown; also written to out/table.md, and as JSON lines to log.jsonl."""
    prompts = [corpus.encoding.encode_ordinary(text)[:64] for text in corpus.prompts(config.eval_prompts)]
    text = "\n\n".join([acceptance_table(config, target, heads, prompts, out),
                        speed_table(config, target, {m: trained[0] for m, trained in heads.items()}, prompts, out)])
    (out / "table.md").write_text(text + "\n")
    return text


def acceptance_table(config, target, heads, prompts, out):
    shape, tokens = TreeShape.parse(config.tree), config.eval_tokens
    lines = [f"Acceptance length tau, tree {shape}, {len(prompts)} held-out prompts x {tokens} tokens, mean over"
             f" {config.seeds} seeds (range); differences paired by prompt, ± standard error.\n",
             "| T | head | tau | over phase I | over control | training, s |", "|---|---|---|---|---|---|"]
    bar = tqdm(total=2 * sum(map(len, heads.values())) + 1, desc="tau", unit="run")
    _, plain = acceptance(target, None, prompts, shape, 0.0, tokens)
    bar.update()
    same = runs = 0
    for temperature in (0.0, 1.0):
        taus = {}
        for method, trained in heads.items():
            taus[method] = []
            for seed, head in enumerate(trained):
                tau, outputs = acceptance(target, head, prompts, shape, temperature, tokens, seed=seed)
                taus[method].append(tau)
                bar.update(), bar.set_postfix(tau=f"{tau.mean():.2f}")
                if temperature == 0:
                    same += sum(a == b for a, b in zip(outputs, plain))
                    runs += len(prompts)
            taus[method] = torch.stack(taus[method])                                  # [seeds, prompts]
        for method, tau in taus.items():
            over = {other: show(tau.mean(0), taus[other].mean(0)) for other in ("phase I", "control")}
            append_log(out / "log.jsonl", table="tau", T=temperature, head=method, tau=tau.mean().item(),
                       by_seed=tau.mean(1).tolist(), over={k: paired(tau.mean(0), taus[k].mean(0)) for k in over})
            lines.append(f"| {temperature:g} | {method} | {tau.mean():.3f}{spread(tau)} |"
                         f" {over['phase I'] if method != 'phase I' else ''} |"
                         f" {over['control'] if method == 'GTO' else ''} | {seconds_of(out, method, config):.0f} |")
    bar.close()
    distinct = sum(len(set(row)) for row in plain) / len(plain)
    lines.append(f"\nGreedy output equal to plain greedy decoding: {same} of {runs} runs. Distinct tokens in"
                 f" {tokens} greedy ones: {distinct:.0f}.")
    return "\n".join(lines)


def speed_table(config, target, heads, prompts, out, count=5):
    """Batch 1, every method and tree in turn on the same prompts, so that they share the machine's good and bad moments."""
    tokens = config.eval_tokens
    one_thread_on_cpu(target.norm.weight.device)
    shapes = [TreeShape.parse(text) for text in dict.fromkeys((*SPEED_TREES, config.tree))]
    lines = [f"Speed at batch 1, {count} prompts x {tokens} tokens, medians, prefill left out; plain decoding runs in the"
             " same engine.\n", "| T | | tokens/s | speed-up |", "|---|---|---|---|"]
    for temperature in tqdm((0.0, 1.0), desc="speed", unit="temperature"):
        capacity = max(map(len, prompts)) + tokens + 16
        engines = {"plain": Engine(target, None, None, Sampling(temperature), capacity=capacity)}
        for method in ("control", "GTO"):
            for shape in shapes:
                engines[f"{method}, tree {shape}"] = Engine(target, heads[method], shape, Sampling(temperature),
                                                           capacity=capacity)
        measured = speeds(engines, prompts[:count], tokens)
        for name, rate in measured.items():
            speedup = (rate / measured["plain"]).median().item()
            append_log(out / "log.jsonl", table="speed", T=temperature, method=name, tokens_per_s=rate.median().item(),
                       speedup=speedup)
            lines.append(f"| {temperature:g} | {name} | {rate.median():.0f} | {speedup:.2f} |")
    return "\n".join(lines)


def spread(tau):
    means = tau.mean(1)
    return f" ({means.min():.3f} .. {means.max():.3f})" if len(means) > 1 else ""


def show(a, b):
    mean, error = paired(a, b)
    return f"{mean:+.3f} ± {error:.3f}"
