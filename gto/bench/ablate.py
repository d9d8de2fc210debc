"""The paper's ablations in miniature, from one phase-I head: what does training for the tree bring, and why?

    python -m gto.bench.ablate                          the head in out, everything
    python -m gto.bench.ablate --only ceilings          only what there is to gain at most: a minute or two
    python -m gto.bench.ablate --target smollm2 --chat --only objectives        of a released target

GTO trains for `steps` steps; what drafts no trees as long as that took, or, named NAME-steps, as many steps on the same
texts. Finished runs are lines of results.jsonl, not run again; table.md shows all. Heads draft along the same texts,
each at the score temperature best on other prompts. Ceilings are what no training, or no better ranking, exceeds."""
import json
from dataclasses import replace
from statistics import mean

import torch
from torch.nn import functional as F

from gto import checkpoint
from gto.config import check
from gto.data import PROMPT, read_prompts
from gto.evaluate import SCORE_TEMPS, best_score_temp, fixed_text, replay_text, tau
from gto.loss import OBJECTIVES, gto_objective
from gto.model import Prefix
from gto.page import path_log_prob
from gto.training import Stage, Texts, copy_of, train_head
from gto.tree import TreeShape, draft_candidates, draft_tree, rerank
from gto.util import append_log, argument_parser, at_least, main_guard, reading, start, table, write_whole

TRIAL = 20    # steps that measure a recipe's pace
SHARP, SOFT = {"label_temperature": 0.3}, {"label_temperature": 1.0}
KEEP = {"objectives": "keep"}

# {table: {run: what differs from out/config.json}}. A control continues phase I: the token-level loss alone.
TABLES = {
    "ceilings": {},
    "objectives": {"gto": {}, "control": {}, "control-sharp": SHARP, "control-soft": SOFT, "keep": KEEP},
    "steps": {"control-steps": {}, "control-sharp-steps": SHARP, "keep-steps": KEEP},
    "groups": {f"m={m}": {"group_size": m, "groups": 32 // m} for m in (1, 4, 16, 32)},
    "aggregator": {name: {"aggregator": name} for name in ("max", "mean", "expected")},
    "others": {"no-debias": {"debias": False}, "omega=0.1": {"omega": 0.1}, "omega=2": {"omega": 2.0}}}
RECIPES = {name: changes for recipes in TABLES.values() for name, changes in recipes.items()}


class TargetAsHead:
    """The target in the draft head's place, for `draft_tree`: drafts with its own distribution. Its "hidden states" are
    logits, its "keys and values" the nodes drafted so far themselves, which every further level runs again."""

    def __init__(self, target):
        self.target = target
        self.token_ids = torch.arange(target.config.vocab_size, device=target.norm.weight.device)

    def logits(self, hidden):
        return hidden

    def __call__(self, _, tokens, positions, seen, prefix, past):
        new = tokens.shape[1]
        if past is not None:
            tokens, positions = torch.cat([past[0], tokens], dim=1), torch.cat([past[1], positions], dim=1)
            seen = torch.cat([F.pad(past[2], (0, new)), seen], dim=1)                 # older nodes see no newer one
        hidden, *_ = self.target(tokens, positions, seen, prefix)
        return self.target.logits(hidden[:, -new:]), tokens, positions, seen


@torch.no_grad()
def ceilings(target, head, fixed, shape, score_temp, temperature):
    """A row of a table: the head's mean tau; what it were if of all its candidates those were kept that the target,
    decoding at `temperature`, likes best; and if the target drafted for itself (at T=0 that is depth + 1, or near it).
    Then, by rank of candidates, mean exp(score) / mean probability of acceptance: {"rank 5..8": "0.075 / 0.031"}."""
    text, drafter, promised, accepted = fixed.text, TargetAsHead(target), [], []
    hidden, kv = head.read(text.features, text.tokens)

    def ranked_by_target(rows, length):
        root, prefix = text.tokens[rows, length], Prefix(kv, length, rows)
        tokens, parents, scores = draft_candidates(head, hidden[rows, length - 1], prefix, shape, score_temp)
        log_P = path_log_prob(target, root, tokens, parents, Prefix(text.kv, length, rows), shape, temperature)
        ranked, order = scores.sort(dim=1, descending=True, stable=True)
        promised.append(ranked.exp()), accepted.append(log_P.gather(1, order).exp())  # [n, C]
        return rerank(root, tokens, parents, log_P, shape)

    def drafted_by_target(rows, length):
        root, prefix = text.tokens[rows, length], Prefix(text.kv, length + 1, rows)
        return draft_tree(drafter, target.logits(text.hidden[rows, length]), root, prefix, shape, temperature or 0.01)

    row = {"T": f"{temperature:g}", "score temp.": f"{score_temp:g}",
           "draft": tau(head, fixed, shape, score_temp).mean().item(),
           "its candidates, ranked by the target": replay_text(fixed, ranked_by_target).mean().item(),
           "the target drafts for itself": replay_text(fixed, drafted_by_target).mean().item()}
    said, true = torch.cat(promised).mean(0), torch.cat(accepted).mean(0)             # [C]
    return row | {f"rank {b // 2 + 1}..{b}": f"{said[b // 2:b].mean():.3f} / {true[b // 2:b].mean():.3f}"
                  for b in (1, 2, 4, 8, 16, 32, 64) if b <= len(said)}


class Ablation:
    """A phase-I head, the texts along which all heads are compared, and the results' folder, by steps and tree."""

    def __init__(self, arguments):
        start(arguments.device)
        out, self.target, _, encode, stop = checkpoint.load_run(arguments)
        config = checkpoint.load_config(out)
        self.config = config = check(replace(config, tree=str(arguments.tree or config.tree), objectives="gto",
                                             gto_steps=arguments.steps or config.gto_steps))
        self.shape, self.folder = TreeShape.parse(config.tree), out / f"ablate-{config.gto_steps}-{config.tree}"
        self.head = checkpoint.load_head(out / "draft.pt", self.target)
        self.texts = Texts(*checkpoint.load_texts(out / "text.pt", self.target), [])
        held_out = read_prompts(out / "prompts.jsonl", config.eval_prompts * 3 // 2)
        checkpoint.remember_config(self.folder, config)           # from here on nothing can be wrong
        prompts = [encode(turns[:1])[:None if arguments.chat else PROMPT] for turns in held_out]
        others, prompts = prompts[::3], [prompt for i, prompt in enumerate(prompts) if i % 3]
        self.test, self.tune = (                                  # the second: to choose score temperatures on
            {T: fixed_text(self.target, some, length, T, self.shape.depth, stop, seed) for T in SCORE_TEMPS}
            for some, length, seed in ((prompts, config.eval_tokens, 0), (others, config.eval_tokens // 2, 1)))

    def train(self, name, seed):
        """Continue the phase-I head by a recipe, and record the outcome."""
        config = replace(self.config, **RECIPES[name])
        objective = None if name.startswith("control") else OBJECTIVES[config.objectives]

        def run(stage):
            head = copy_of(self.head, self.target)
            train_head(stage, config, self.target, head, self.texts, self.folder, objective, objective and self.head)
            return head, checkpoint.seconds_of(self.folder, stage.name)

        stage = Stage(f"{name}-seed{seed}", config.gto_steps, config.gto_batch, config.gto_rate, config.seed + seed)
        if objective is not gto_objective and not name.endswith("-steps"):
            stage = stage._replace(batch=config.head_batch)       # no dear trees: more texts a step, more steps
            pace = TRIAL / run(stage._replace(name="trial", steps=TRIAL))[1]
            stage = stage._replace(steps=max(1, round(pace * read_results(self.folder)["gto"][seed]["seconds"])))
        head, seconds = run(stage)
        self.record(head, run=name, seed=seed, steps=stage.steps, seconds=seconds)

    def record(self, head, **record):
        """Append to results.jsonl, with {"T=0": {"score_temp": the head's best, "tau": [by prompt]}, "T=1": ..}."""
        for T, temperatures in SCORE_TEMPS.items():
            best = best_score_temp(head, self.tune[T], self.shape, temperatures)
            record[f"T={T:g}"] = {"score_temp": best, "tau": tau(head, self.test[T], self.shape, best).tolist()}
            if head is self.head:                                 # dear: on the fewer and shorter texts
                record[f"T={T:g}"]["ceilings"] = ceilings(self.target, head, self.tune[T], self.shape, best, T)
        append_log(self.folder / "results.jsonl", **record)
        self.write_tables()

    def write_tables(self):
        """All that the finished runs allow, in table.md."""
        results, rows = read_results(self.folder), []
        for name, runs in results.items():
            rows.append({"run": name, "seeds": len(runs), "steps": mean(run["steps"] for run in runs),
                         "seconds": f"{mean(run['seconds'] for run in runs):.0f}"})
            for T in ("T=0", "T=1"):
                rows[-1][f"tau, {T}"] = mean(mean(run[T]["tau"]) for run in runs)
                rows[-1] |= {f"over {each}, {T}": over_control(results, name, T, each)
                             for each in ("control", "control-steps") if each in results}
        limits = [results["draft"][0][T]["ceilings"] for T in ("T=0", "T=1")]
        text = ("Phase I's tau and ceilings, on the prompts that choose score temperatures; by rank of candidates"
                f" what their scores promise / what is accepted.\n\n{table(limits)}\n\ntau with tree {self.shape};"
                f" differences paired by prompt and seed, ± standard error over both.\n\n{table(rows)}\n")
        write_whole(self.folder / "table.md", text)


def read_results(folder):
    """{run: [a record per finished seed, in order]}; "draft" is the phase-I head."""
    results, path = {}, folder / "results.jsonl"
    with reading(path):
        for record in map(json.loads, path.read_text().splitlines() if path.exists() else ()):
            results.setdefault(record["run"], []).append(record)
    return results


def over_control(results, name, T, control="control"):
    """'+0.031 ± 0.020': tau less control's, paired by prompt and seed, ± both standard errors: rather too wide."""
    pairs = list(zip(results[name], results.get(control, ())))
    if name == control or not pairs:
        return ""
    gains = torch.tensor([a[T]["tau"] for a, _ in pairs]) - torch.tensor([b[T]["tau"] for _, b in pairs])
    samples = (gains.mean(0), gains.mean(1)) if len(gains) > 1 else gains             # of [seeds, prompts]
    return f"{gains.mean():+.3f} ± {sum(each.var() / len(each) for each in samples) ** 0.5:.3f}"


def main(argv=None):
    parser = argument_parser("python -m gto.bench.ablate", __doc__, "--device", "--dtype", "--out-dir", "--target",
                             "--tokenizer", "--chat")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[*TABLES, *RECIPES], default=list(TABLES),
                        help="tables and runs: %(choices)s")
    parser.add_argument("--seeds", type=at_least(1), default=3)
    parser.add_argument("--steps", type=at_least(1), help="of a run of GTO; default: the config's")
    parser.add_argument("--tree", type=TreeShape.parse, metavar="K,D,G", help="children,depth,nodes; the config's")
    arguments = parser.parse_args(argv)
    torch.set_float32_matmul_precision("high")
    ablation = Ablation(arguments)
    results = read_results(ablation.folder)
    if not results:
        ablation.record(ablation.head, run="draft", steps=0, seconds=0.0)
    # A table's name stands for its runs; gto, which sets the time, and control are always run.
    names = {name for item in arguments.only for name in TABLES.get(item, [item])}
    names |= {"gto", "control"} if names else set()
    for seed in range(arguments.seeds):                               # wherever it stops, seeds can be compared
        for name in RECIPES:
            if name in names and seed >= len(results.get(name, ())):
                ablation.train(name, seed)
    print((ablation.folder / "table.md").read_text())


if __name__ == "__main__":
    main_guard(main)
