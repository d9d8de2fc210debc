"""From nothing to the paper's comparison: data, target, draft head, its continuation, GTO, a table.

    python train.py                      everything, about ten minutes on two CPU cores
    python train.py --preset gpu         a larger target on one GPU, about 25 minutes
    python train.py --stage head         one stage (earlier ones must be finished)
    python train.py --stage ltd          not part of "everything": policies that choose a draft's depth and size
    python train.py --omega 0.3 --out out/omega     any number of gto/config.py is a flag

A finished stage is not run again, an interrupted one goes on where it was: run the same command again.
"""
import argparse
import json
from dataclasses import asdict, fields, replace
from pathlib import Path

import gto  # noqa: F401  before torch: it sets the thread environment
import torch
from tqdm import tqdm

from gto import checkpoint, config as configs, ltd, report, stages
from gto.data import ensure_data
from gto.errors import UserError, main_guard
from gto.trainer import append_log, finish

STAGES = ("target", "text", "head", "gto", "table", "ltd")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: (_ for _ in ()).throw(UserError(f"{message} (python train.py --help)"))
    parser.add_argument("--preset", default="cpu", help="cpu or gpu: the numbers to start from")
    parser.add_argument("--stage", choices=STAGES, help="only this stage; default: all up to table")
    parser.add_argument("--out", help="where checkpoints, log and table go; default out/<preset>")
    parser.add_argument("--data", help="a directory made by prepare_data.py; default data/<dataset>")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for field in fields(configs.Config):
        kind = {"True": True, "False": False}.__getitem__ if field.type is bool else field.type
        parser.add_argument("--" + field.name.replace("_", "-"), type=kind, default=argparse.SUPPRESS)
    arguments = vars(parser.parse_args())
    changes = {name: arguments.pop(name) for name in list(arguments) if name in asdict(configs.Config())}
    return arguments, configs.preset(arguments["preset"], **changes)


def load_or_make(out, name, device, target, make):
    """The head out/name.pt; trained by `make() -> (head, seconds)` and saved if it is not there yet."""
    path = out / f"{name}.pt"
    if not path.exists():
        head, seconds = make()
        checkpoint.save_model(path, head)
        append_log(out / "log.jsonl", stage=name, finished=True, seconds=seconds)
        finish(name, out)
    return checkpoint.load_head(path, target, device)


def remember_config(out, config):
    """One directory holds one experiment: its numbers are written once and must not change under a resumed run."""
    path = out / "config.json"
    if path.exists():
        before = json.loads(path.read_text())
        changed = [name for name, value in asdict(config).items() if before.get(name) != value]
        if changed:
            raise UserError(f"{out} was trained with another {', '.join(changed)}: choose another --out, or delete it")
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(config), indent=1))


def main():
    arguments, config = parse_arguments()
    device, out = arguments["device"], Path(arguments["out"] or f"out/{arguments['preset']}")
    torch.set_float32_matmul_precision("high")
    last = STAGES.index(arguments["stage"] or "table")
    if arguments["stage"] is None and arguments["preset"] == "cpu" and not (out / "target.pt").exists():
        print("About ten minutes on two quiet cores: target 4, its text 1, head 1.5, GTO and control 2.5, table 1.", flush=True)
    if arguments["data"]:
        corpus = ensure_data(arguments["data"])                    # its vocabulary is what it is
    else:
        corpus = ensure_data(f"data/{config.dataset}", config.dataset, config.vocab_size)
    remember_config(out, config)

    if not (out / "target.pt").exists():
        target = stages.train_target(config, corpus, out, device)
        checkpoint.save_model(out / "target.pt", target)
        finish("target", out)
        append_log(out / "log.jsonl", stage="target", finished=True,
                   validation_loss=stages.validation_loss(target, corpus, config))
    target = checkpoint.load_target(out / "target.pt", device)
    if device == "cuda":
        stages.cast(target, torch.bfloat16)
    if last == STAGES.index("target"):
        return

    if not (out / "text.pt").exists():
        texts = stages.write_texts(config, target, corpus, lambda steps: tqdm(steps, desc="text", unit="batch"))
        checkpoint.save(out / "text.pt", kind="text", tokens=texts)
    texts = checkpoint.read(out / "text.pt", "text")["tokens"]
    if last == STAGES.index("text"):
        return

    def phase_one():
        head = stages.new_head(config, target, texts)
        return head, stages.train_head("head", config, target, head, texts, config.head_steps, 1.0,
                                       config.head_batch, config.seed, out)

    head = load_or_make(out, "head", device, target, phase_one)
    if last == STAGES.index("head"):
        return

    heads = {"phase I": [head], "control": [], "GTO": []}
    for seed in range(config.seed, config.seed + config.seeds):
        def phase_two():
            student = stages.copy_of(head, target)
            return student, stages.train_head(f"gto-{seed}", config, target, student, texts, config.gto_steps,
                                              config.gto_rate, config.gto_batch, seed, out, reference=head)

        def continuation():
            student, steps = stages.copy_of(head, target), report.matched_steps(out, config, seed)
            return student, stages.train_head(f"control-{seed}", config, target, student, texts, steps, config.gto_rate,
                                              config.head_batch, seed, out)

        heads["GTO"].append(load_or_make(out, f"gto-{seed}", device, target, phase_two))
        heads["control"].append(load_or_make(out, f"control-{seed}", device, target, continuation))
    if last == STAGES.index("gto"):
        return
    if device == "cuda":
        for method in heads.values():
            for head in method:
                stages.cast(head, torch.bfloat16)
    if last == STAGES.index("ltd"):
        chosen = {"phase I": ("head.pt", head), "GTO": (f"gto-{config.seed}.pt", heads["GTO"][0])}
        print(ltd.run(config, target, chosen, corpus, out))
        return
    print(report.tables(config, target, heads, corpus, out))


if __name__ == "__main__":
    main_guard(main)
