"""The paper's ablations in miniature, from one phase-I head: what does training for the tree bring, and why?

    python -m gto.ablate                              the head in out, everything: 40 minutes on two quiet cores
    python -m gto.ablate --only ceilings              only what there is to gain at most: a minute or two
    python -m gto.ablate --only objectives --minutes 25 --name objectives
    python -m gto.ablate --only gto cut --seeds 5 --steps 100

Every run continues the same phase-I head for the same time: `steps` steps of GTO, or as many steps of another kind as
take equally long on this machine. A finished run is a JSON line in out/<name>/<recipe>.jsonl and is not run again;
the tables, also in table.md, show what is there so far.

All heads draft along the same texts (gto/fixed_text.py), one per prompt and temperature, and differ in nothing else.
Each uses its own best score temperature, chosen at T=0 and at T=1 on other held-out prompts than those reported.
"""
import hashlib
import json
import statistics
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import gto  # noqa: F401  before torch: it sets the thread environment
import torch

from gto import checkpoint, compare, stages
from gto.ceilings import calibration, rerank_tau, self_tau
from gto.config import Config
from gto.data import Corpus
from gto.errors import UserError, argument_parser, main_guard
from gto.fixed_text import SCORE_TEMPS, best_score_temp, every_other, tau, write, written
from gto.model import cast
from gto.summary import mean
from gto.trainer import append_log
from gto.tree import TreeShape

SHARP, SOFT, DEEP = {"label_temperature": 0.3}, {"label_temperature": 1.0}, {"unroll": 7}
KEEP = {"objective": "keep", "omega": 3.0}
CUT, DISTILL = {"objective": "cut", "tree_clip": 0.1}, {"objective": "distill", "tree_clip": 0.1}
GREEDY = {"reward_temperature": 0.0, **SHARP}

# name: what differs from out/config.json. The runs of a table are in order of importance.
TABLES = {
    "objectives": {"control": {}, "control-sharp": SHARP, "control-soft": SOFT, "control-deep": SHARP | DEEP,
                   "gto": {}, "keep": KEEP, "keep-sharp": KEEP | SHARP, "keep-deep": KEEP | SHARP | DEEP,
                   "cut-greedy": CUT | GREEDY, "tv": {"objective": "tv"}, "gto-sharp": SHARP,
                   "tv-sharp": {"objective": "tv", **SHARP}, "cut": CUT, "distill": DISTILL,
                   "distill-greedy": DISTILL | GREEDY},
    "groups": {f"m={m}": {"group_size": m, "groups": 128 // m} for m in (1, 4, 16, 32)},
    "aggregator": {name: {"aggregator": name} for name in ("max", "mean", "expected")},
    "debias": {"no-debias": {"debias": False}},
    "omega": {"omega=0.1": {"omega": 0.1}, "omega=2": {"omega": 2.0}, "tree-clip": {"tree_clip": 0.1}},
}
RECIPES = {name: changes for table in TABLES.values() for name, changes in table.items()}
OTHER_TREES = "control", "gto"         # these are also measured with the trees around the one trained with


class Setting(NamedTuple):
    """What all runs share."""
    config: Config
    target: torch.nn.Module
    head: torch.nn.Module
    texts: torch.Tensor
    test: dict               # decoding temperature -> FixedText, what is reported
    tune: dict               # the same on other prompts, to choose score temperatures on
    out: Path


def parse_arguments(argv):
    parser = argument_parser("python -m gto.ablate", __doc__)
    parser.add_argument("--out-dir", default="out", help="what train.py --stage draft left (default: %(default)s)")
    parser.add_argument("--data", help="the corpus directory; default: data/ and the dataset's name")
    parser.add_argument("--name", default="ablate", help="folder in --out-dir for the results (default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="NAME", default=list(TABLES),
                        help=f"ceilings, tables ({', '.join(TABLES)}) or runs ({', '.join(RECIPES)})")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="steps of GTO, or their time; default: as many as fit")
    parser.add_argument("--minutes", type=float, default=40, help="time for all runs (default: %(default)s)")
    parser.add_argument("--tree", help="children,levels,nodes of training and evaluation; default: the config's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(argv)
    unknown = [name for name in arguments.only if name not in ("ceilings", *TABLES, *RECIPES)]
    if unknown:
        raise UserError(f"nothing is called '{unknown[0]}': choose of ceilings, {', '.join([*TABLES, *RECIPES])}")
    if arguments.seeds < 1 or arguments.minutes <= 0 or (arguments.steps or 1) < 1:
        raise UserError("--seeds, --steps and --minutes must be positive")
    return arguments


def load(arguments):
    """-> Setting. Also holds the results' folder to one head and one config."""
    source = Path(arguments.out_dir)
    try:
        config = Config(**json.loads((source / "config.json").read_text()))
    except (OSError, ValueError, TypeError):
        raise UserError(f"{source}/config.json is missing or of another version: run python train.py --stage draft"
                        f" --out-dir {source}") from None
    config = replace(config, tree=arguments.tree or config.tree)
    device, shape, out = arguments.device, TreeShape.parse(config.tree), source / arguments.name
    target = checkpoint.load_target(source / "target.pt", device)
    head = checkpoint.load_head(source / "draft.pt", target, device)
    texts = checkpoint.read(source / "text.pt", "text")["tokens"]
    same = {"config": asdict(config), "head": hashlib.sha256((source / "draft.pt").read_bytes()).hexdigest()}
    if (out / "setting.json").exists() and json.loads((out / "setting.json").read_text()) != same:
        raise UserError(f"{out} holds results of another draft.pt, config.json or --tree: choose another --name,"
                        " or delete it")
    out.mkdir(parents=True, exist_ok=True)
    (out / "setting.json").write_text(json.dumps(same, indent=1))
    if device == "cuda":
        cast(target, torch.bfloat16)
    corpus = Corpus(arguments.data or f"data/{config.dataset}")
    prompts = corpus.prompt_ids(2 * config.eval_prompts)
    half, levels = min(config.eval_prompts, len(prompts) // 2), shape.levels + 1      # Table 7 has a deeper tree
    test = {T: write(target, prompts[:half], config.eval_tokens, T, levels) for T in SCORE_TEMPS}
    others = prompts[half:half + max(1, half // 2)]
    tune = {T: write(target, others, config.eval_tokens // 2, T, levels, seed=1) for T in SCORE_TEMPS}
    return Setting(config, target, head, texts, test, tune, out)


def read_results(out):
    """{name: [a record per finished seed, in order]}."""
    results = {}
    for path in sorted(out.glob("*.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        results[path.stem] = sorted((line for line in lines if "seed" in line), key=lambda line: line["seed"])
    return results


# One run -----------------------------------------------------------------------------------------------------------

def kind(name):
    return "token" if name.startswith("control") else RECIPES[name].get("objective", "gto")


def pace_of(name):
    """Runs of one pace cost the same per step."""
    return kind(name) + ("-deep" if "unroll" in RECIPES[name] else "")


def train(setting, name, steps, seed, out):
    """Continue the phase-I head by a recipe. -> head, seconds."""
    config = replace(setting.config, **RECIPES[name])
    student, token = stages.copy_of(setting.head, setting.target), kind(name) == "token"
    # Trees of two heads and groups of positions are dear: GTO sees fewer sequences a step than the others.
    batch = config.gto_batch if kind(name) == "gto" else config.head_batch
    seconds = stages.train_head(f"{name}-{seed}", config, setting.target, student, setting.texts, steps,
                                config.gto_rate, batch, config.seed + seed, out, reference=None if token else setting.head)
    return student, seconds


def evaluate(setting, head, other_trees=False):
    """What of a head is recorded: tau by prompt with its best score temperature, by decoding temperature."""
    shape, record = TreeShape.parse(setting.config.tree), {}
    for T, grid in SCORE_TEMPS.items():
        best, tuned = best_score_temp(head, setting.tune[T], shape, grid)
        record[f"T={T:g}"] = {"score_temp": best, "tau": tau(head, setting.test[T], shape, best).tolist(),
                              "tuned": {f"{s:g}": value for s, value in tuned.items()}}
        if other_trees:
            record[f"T={T:g}"]["trees"] = {str(s): tau(head, setting.tune[T], s, best).tolist() for s in around(shape)}
    return record


def around(shape):
    """Nine trees: a level less or more, a third of the nodes less or more."""
    return [TreeShape(shape.branch, levels, nodes) for levels in (shape.levels - 1, shape.levels, shape.levels + 1)
            for nodes in (shape.nodes * 2 // 3, shape.nodes, shape.nodes * 4 // 3)
            if levels > 0 and 0 < nodes <= TreeShape(shape.branch, levels, 1).candidates]


def measure_ceilings(setting):
    """The phase-I head next to what cannot be exceeded, the latter on every other text: it is dear. -> record."""
    shape, record = TreeShape.parse(setting.config.tree), evaluate(setting, setting.head)
    for T, fixed in setting.test.items():
        entry, target, head = record[f"T={T:g}"], setting.target, setting.head
        some = every_other(fixed)
        entry["rerank"] = rerank_tau(target, head, some, shape, entry["score_temp"], T).tolist()
        entry["self"] = self_tau(target, some, shape, T or min(SCORE_TEMPS[T])).tolist()
        entry["calibration"] = {f"{s:g}": calibration(target, head, fixed, shape, s, T)
                                for s in sorted({1.0, entry["score_temp"]})}
        entry["distinct"] = mean([len(set(row)) for row in written(fixed, setting.config.eval_tokens)])
    return record


# The plan ----------------------------------------------------------------------------------------------------------

def measure_paces(setting, paces, rounds=3):
    """Seconds of a step by pace: the median over rounds of two steps in turn, after one round of warm-up."""
    example = {pace_of(name): name for name in reversed(RECIPES)}
    found = {k: [] for k in paces}
    with tempfile.TemporaryDirectory() as nowhere:
        for _ in range(rounds + 1):
            for k in paces:
                found[k].append(train(setting, example[k], 2, 0, nowhere)[1] / 2)
    return {k: statistics.median(values[1:]) for k, values in found.items()}


def plan(setting, names, arguments):
    """Steps by pace, measured once: a continued experiment trains all its runs for as long as the first. -> plan."""
    path = setting.out / "plan.json"
    known = json.loads(path.read_text()) if path.exists() else {"pace": {}, "steps": arguments.steps}
    if path.exists() and arguments.steps not in (None, known["steps"]):
        raise UserError(f"{setting.out} was begun with --steps {known['steps']}: leave --steps out, or choose another"
                        " --name")
    missing = [k for k in dict.fromkeys(["gto", *map(pace_of, names)]) if k not in known["pace"]]
    if missing:
        known["pace"] |= measure_paces(setting, missing)
    if "evaluation" not in known:
        began = time.perf_counter()
        evaluate(setting, setting.head)
        known["evaluation"] = time.perf_counter() - began
    if known["steps"] is None:
        runs = len(names) * arguments.seeds
        left = arguments.minutes * 60 - evaluation_seconds(known, names) * arguments.seeds
        known["steps"] = max(1, int(left / runs / known["pace"]["gto"]))
    path.write_text(json.dumps(known, indent=1))
    return known


def evaluation_seconds(known, names):
    return known["evaluation"] * sum(3 if name in OTHER_TREES else 1 for name in names)


def steps_of(known, name):
    return max(1, round(known["steps"] * known["pace"]["gto"] / known["pace"][pace_of(name)]))


def minutes_of(known, names):
    return (known["steps"] * known["pace"]["gto"] * len(names) + evaluation_seconds(known, names)) / 60


def chosen(only):
    """Names of recipes in order; a table's name stands for its runs. Those that all are compared with are added."""
    names = [name for item in only for name in (TABLES.get(item) or [item]) if name != "ceilings"]
    return [name for name in RECIPES if name in {*names, "control", "control-sharp", "gto"}] if names else []


def main(argv=None):
    arguments = parse_arguments(argv)
    setting, names = load(arguments), chosen(arguments.only)
    if not read_results(setting.out).get("draft"):
        print("Ceilings first: a minute or two.", flush=True)
        append_log(setting.out / "draft.jsonl", seed=0, steps=0, seconds=0.0, **measure_ceilings(setting))
    results = read_results(setting.out)
    print(compare.ceilings(results["draft"][0], setting.config), flush=True)
    if not names:
        return
    known, done = plan(setting, names, arguments), {(n, r["seed"]) for n, runs in results.items() for r in runs}
    # Table by table, and in it seed by seed: whenever it is stopped, what is there can be compared.
    order = [(name, seed) for table in TABLES.values() for seed in range(arguments.seeds) for name in table
             if name in names and (name, seed) not in done]
    print(f"\n{len(order)} runs to go, each as long as {known['steps']} steps of GTO: about"
          f" {minutes_of(known, [name for name, _ in order]):.0f} minutes.", flush=True)
    for i, (name, seed) in enumerate(order):
        left = minutes_of(known, [name for name, _ in order[i:]])
        print(f"[{i + 1}/{len(order)}, {left:.0f} minutes left] {name}, seed {seed}", flush=True)
        head, seconds = train(setting, name, steps_of(known, name), seed, setting.out / "training")
        append_log(setting.out / f"{name}.jsonl", seed=seed, steps=steps_of(known, name), seconds=seconds,
                   changes=RECIPES[name], **evaluate(setting, head, other_trees=name in OTHER_TREES))
        (setting.out / "training" / f"{name}-{seed}.partial.pt").unlink(missing_ok=True)
        write_tables(setting)
    print("\n" + write_tables(setting))


def write_tables(setting):
    """All tables that the finished runs allow, also in table.md. -> Markdown."""
    text = compare.tables(read_results(setting.out), {title: list(runs) for title, runs in TABLES.items()}, setting.config)
    (setting.out / "table.md").write_text(text + "\n")
    return text


if __name__ == "__main__":
    main_guard(main)
