"""From nothing to the paper's comparison: data, target, draft head, its continuation, GTO, a table.

    python train.py                      everything, about ten minutes on two CPU cores
    python train.py --preset smoke       every step of the way in half a minute
    python train.py --stage draft        stop after a stage: target, text, draft, gto or table
    python train.py --omega 0.3 --out-dir out/omega     any number of gto/config.py is a flag

For a released target, on its answers in a chat .jsonl, with the paper's numbers (see gto/released/README.md):

    python train.py --target Llama-3.1-8B-Instruct --data chat.jsonl                     phase I, then GTO
    python train.py --target Llama-3.1-8B-Instruct --data chat.jsonl --head EAGLE3-head  GTO from a finished head
    torchrun --nproc_per_node=8 train.py ... [--spread]     a batch on each GPU; --spread: the target over all of them

A finished stage is not run again, an interrupted one goes on where it was.
"""
import argparse
from dataclasses import fields
from pathlib import Path

import gto  # noqa: F401  before torch: it sets the thread environment
import torch

from gto import config as configs, evaluate
from gto.checkpoint import (exists, load_encoding, load_head, load_target, read, remember_config, save,
                            seconds_of)
from gto.data import Corpus, ensure_data
from gto.loss import OBJECTIVES
from gto.model import cast
from gto.training import Stage, Texts, copy_of, new_head, train_head, train_target, write_texts
from gto.util import UserError, argument_parser, main_guard, rank, ranks, start, wait

STAGES = ("target", "text", "draft", "gto", "table")


def parse_arguments():
    parser = argument_parser("python train.py", __doc__)
    parser.add_argument("--preset", choices=configs.PRESETS, help="the numbers to start from; default: by the device,"
                        " with --target real")
    parser.add_argument("--stage", choices=STAGES, default="table", help="stop after this stage (default: %(default)s)")
    parser.add_argument("--out-dir", default="out", help="where checkpoints, log and table go (default: out)")
    parser.add_argument("--data", help="a directory made by prepare_data.py (default data/<dataset>), or a chat .jsonl")
    parser.add_argument("--target", help="a folder of Meta's or Hugging Face's files; needs --data chat.jsonl")
    parser.add_argument("--head", help="with --target: start from this head, ours or a folder with an EAGLE-3 head")
    parser.add_argument("--tokenizer", help="with --target: default its folder")
    parser.add_argument("--spread", action="store_true", help="with --target: its layers over all GPUs of torchrun")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    names = [field.name for field in fields(configs.Config)]
    for field in fields(configs.Config):
        kind = {"True": True, "False": False}.__getitem__ if field.type is bool else field.type
        parser.add_argument("--" + field.name.replace("_", "-"), type=kind, default=argparse.SUPPRESS,
                            choices=OBJECTIVES if field.name == "objective" else None, help="see gto/config.py")
    arguments = parser.parse_args()
    changes = {name: value for name, value in vars(arguments).items() if name in names}
    if arguments.target and not arguments.data:
        raise UserError("--target needs conversations to learn from: --data chat.jsonl")
    if arguments.target and not Path(arguments.data).is_file():
        raise UserError(f"--data {arguments.data} does not exist")
    if not arguments.target and (arguments.head or arguments.tokenizer or arguments.spread):
        raise UserError("--head, --tokenizer and --spread are for a released target: add --target FOLDER")
    fitting = "real" if arguments.target else "laptop" if arguments.device == "cpu" else "gpu"
    return arguments, configs.preset(arguments.preset or fitting, **changes)


def own_target(arguments, config, out):
    """The corpus, and the target trained on it."""
    directory, device = arguments.data or f"data/{config.dataset}", arguments.device
    if not arguments.data and rank() == 0:
        ensure_data(directory, config.dataset, config.vocab_size)
    wait()
    corpus = Corpus(directory)
    remember_config(out, config, corpus)
    if not exists(out / "target.pt"):
        train_target(config, corpus, out, device)
    return corpus, load_target(out / "target.pt", device, torch.bfloat16 if device != "cpu" else None)


def training_texts(arguments, config, out, target, corpus):
    """What heads are trained on: text that the target writes itself, or the answers of a released target's chats."""
    if not exists(out / "text.pt"):
        if corpus:
            tokens, supervised = write_texts(config, target, corpus)
        else:
            from gto.released.chat import encode_conversations
            encoding = load_encoding(arguments.tokenizer or arguments.target)
            tokens, supervised = encode_conversations(arguments.data, encoding, config.length, config.unroll).values()
        save(out / "text.pt", kind="text", tokens=tokens, supervised=supervised)
    contents = read(out / "text.pt", "text")
    return Texts(contents["tokens"], contents["supervised"])


def main():
    arguments, config = parse_arguments()
    out, device, stage = Path(arguments.out_dir), arguments.device, arguments.stage
    torch.set_float32_matmul_precision("high")
    start(device)
    if arguments.spread and ranks() == 1:
        raise UserError("--spread needs torchrun --nproc_per_node=N train.py ...")

    # The target, and text to train heads on.
    if arguments.target:
        corpus, target = None, load_target(arguments.target, device, ranks="gather" if arguments.spread else None)
        remember_config(out, config, target=Path(arguments.target).name, data=Path(arguments.data).name)
    else:
        corpus, target = own_target(arguments, config, out)
    if stage == "target":
        return
    texts = training_texts(arguments, config, out, target, corpus)
    if stage == "text":
        return

    # Phase I: token-level training. A finished head may take its place, or be where it starts.
    given = load_head(arguments.head, target, torch.float32) if arguments.head else None
    if not exists(out / "draft.pt") and (given is None or stage == "draft"):
        head = copy_of(given, target) if given else new_head(config, target, texts)
        phase_one = Stage("draft", config.head_steps, config.head_batch, seed=config.seed)
        train_head(phase_one, config, target, head, texts, out)
    draft = given if given and stage != "draft" else load_head(out / "draft.pt", target)
    if stage == "draft":
        return

    # Phase II: Group Tree Optimization, and beside it the control, phase I continued for as long.
    heads = {"draft": [draft], "control": [], "gto": []}
    for number in range(config.seeds):
        seed, suffix = config.seed + number, f"-{number + 1}" if number else ""        # gto.pt, gto-2.pt, ..
        phase_two = Stage(f"gto{suffix}", config.gto_steps, config.gto_batch, config.gto_rate, seed)
        if not exists(out / f"{phase_two.name}.pt"):
            objective = OBJECTIVES[config.objective]
            train_head(phase_two, config, target, copy_of(draft, target), texts, out, objective, reference=draft)
        heads["gto"].append(load_head(out / f"{phase_two.name}.pt", target))
        if not corpus:
            continue
        if not exists(out / f"control{suffix}.pt"):
            steps = max(1, round(seconds_of(out, phase_two.name) / seconds_of(out, "draft") * config.head_steps))
            control = Stage(f"control{suffix}", steps, config.head_batch, config.gto_rate, seed)
            train_head(control, config, target, copy_of(draft, target), texts, out)
        heads["control"].append(load_head(out / f"control{suffix}.pt", target))
    if stage == "gto" or not corpus or rank() > 0:
        return

    # The comparison.
    for head in sum(heads.values(), []) if device != "cpu" else ():
        cast(head, torch.bfloat16)
    print(evaluate.report(config, target, heads, corpus, out))


if __name__ == "__main__":
    main_guard(main)
