"""From nothing to the paper's comparison: data, target, draft head, its continuation, GTO, a table.

    python train.py                      everything, about ten minutes on two CPU cores
    python train.py --preset gpu         a larger target on one GPU, about 25 minutes
    python train.py --stage draft        one stage (earlier ones must be finished)
    python train.py --stage ltd          not part of "everything": policies that choose a draft's depth and size
    python train.py --omega 0.3 --out-dir out/omega     any number of gto/config.py is a flag

For a released target, on its answers in a chat .jsonl (ShareGPT's format and others), with the paper's numbers:

    python train.py --target Llama-3.1-8B-Instruct --data chat.jsonl                     phase I, then GTO
    python train.py --target Llama-3.1-8B-Instruct --data chat.jsonl --head EAGLE3-head  GTO from a finished head
    python train.py ... --head EAGLE3-head --stage draft                                 phase I goes on from this head
    torchrun --nproc_per_node=8 train.py ... [--spread]     a batch on each GPU; --spread: the target over all of them

A finished stage is not run again, an interrupted one goes on with --resume.
"""
import argparse
import itertools
from dataclasses import asdict, fields
from pathlib import Path

import gto  # noqa: F401  before torch: it sets the thread environment
import torch
from tqdm import tqdm

from gto import checkpoint, config as configs, ltd, parallel, report, stages
from gto.conversations import encode_conversations
from gto.data import Corpus, ensure_data
from gto.errors import UserError, argument_parser, main_guard
from gto.experiment import head_in, remember_config, run_name, texts_in
from gto.load import load_head, load_target
from gto.model import cast
from gto.tokenizer import load_encoding
from gto.trainer import append_log, finish

STAGES = ("target", "text", "draft", "gto", "table", "ltd")


def parse_arguments():
    parser = argument_parser("python train.py", __doc__)
    parser.add_argument("--preset", help="smoke, laptop, gpu or real: the numbers to start from; default: by the"
                        " device, with --target real")
    parser.add_argument("--stage", choices=STAGES, help="only this stage; default: all up to table")
    parser.add_argument("--out-dir", default="out", help="where checkpoints, log and table go (default: out)")
    parser.add_argument("--resume", action="store_true", help="go on with a stage that was interrupted")
    parser.add_argument("--data", help="a directory made by prepare_data.py (default data/<dataset>), or a chat .jsonl")
    parser.add_argument("--target", help="a folder of Meta's or Hugging Face's files; needs --data chat.jsonl")
    parser.add_argument("--head", help="with --target: start from this head, ours or a folder with an EAGLE-3 head")
    parser.add_argument("--tokenizer", help="with --target: default its folder")
    parser.add_argument("--spread", action="store_true", help="with --target: its layers over all GPUs of torchrun")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    meaning = configs.comments()
    for field in fields(configs.Config):
        kind = {"True": True, "False": False}.__getitem__ if field.type is bool else field.type
        parser.add_argument("--" + field.name.replace("_", "-"), type=kind, default=argparse.SUPPRESS,
                            help=meaning.get(field.name))
    arguments = vars(parser.parse_args())
    changes = {name: arguments.pop(name) for name in list(arguments) if name in asdict(configs.Config())}
    real = arguments["target"] is not None
    if real and not arguments["data"]:
        raise UserError("--target needs conversations to learn from: --data chat.jsonl")
    for name in ("target", "data", "head") if real else ():
        if arguments[name] and not Path(arguments[name]).exists():
            raise UserError(f"--{name} {arguments[name]} does not exist")
    if not real and (arguments["head"] or arguments["tokenizer"] or arguments["spread"]):
        raise UserError("--head, --tokenizer and --spread are for a released target: add --target FOLDER")
    if real and arguments["stage"] in ("table", "ltd"):
        raise UserError(f"--stage {arguments['stage']} is for the target trained here: compare heads of a released one"
                        f" with python -m gto.bench")
    by_device = "laptop" if arguments["device"] == "cpu" else "gpu"
    arguments["preset"] = arguments["preset"] or ("real" if real else by_device)
    return arguments, configs.preset(arguments["preset"], **changes)


def released_target(arguments, config, out, device):
    """A downloaded target, its tokenised conversations, and the head to start from, if one is given."""
    remember_config(out, config, target=Path(arguments["target"]).name, data=Path(arguments["data"]).name)
    encoding = load_encoding(arguments["tokenizer"] or arguments["target"])
    texts, supervised = texts_in(out, lambda: encode_conversations(arguments["data"], encoding, config.length,
                                                                   room=config.unroll))
    target = load_target(arguments["target"], device, ranks="gather" if arguments["spread"] else None)
    given = load_head(arguments["head"], target, torch.float32) if arguments["head"] else None
    return target, texts, supervised, given


def own_target(arguments, config, out, device):
    """The corpus, the target trained on it and, unless the stage is "target", the texts that it writes."""
    name = arguments["data"] or f"data/{config.dataset}"
    if parallel.rank() == 0 and not arguments["data"]:
        ensure_data(name, config.dataset, config.vocab_size)
    parallel.wait()
    corpus = Corpus(name)                                                             # a named one must be there
    remember_config(out, config)
    if arguments["stage"] is None and arguments["preset"] == "laptop" and not (out / "target.pt").exists():
        print("About ten minutes on two cores: target 3 to 4, its text 0.6, draft head 2, GTO and control 2, the table 2.",
              flush=True)
    if not parallel.exists(out / "target.pt"):
        target, seconds = stages.train_target(config, corpus, out, device)
        checkpoint.save_model(out / "target.pt", target)
        finish("target", out)
        append_log(out / "log.jsonl", stage="target", finished=True, seconds=seconds,
                   validation_loss=stages.validation_loss(target, corpus, config))
    target = checkpoint.load_target(out / "target.pt", device)
    if device == "cuda":
        cast(target, torch.bfloat16)
    texts = None
    if arguments["stage"] != "target":
        texts, _ = texts_in(out, lambda: {"tokens": stages.write_texts(
            config, target, corpus, lambda steps: tqdm(steps, desc="text", unit="batch"))})
    return corpus, target, texts


def main():
    arguments, config = parse_arguments()
    device, out, stage = arguments["device"], Path(arguments["out_dir"]), arguments["stage"]
    for interrupted in out.glob("*.partial.pt") if not arguments["resume"] else ():
        raise UserError(f"{interrupted} is of an interrupted run: add --resume to go on, or delete it to begin that stage anew")
    torch.set_float32_matmul_precision("high")
    parallel.start(device)
    if parallel.ranks() == 1 and arguments["spread"] or parallel.ranks() > 1 and stage == "ltd":
        raise UserError("--spread needs torchrun --nproc_per_node=N train.py ..., --stage ltd a single process")
    if arguments["target"]:
        corpus, (target, texts, supervised, given) = None, released_target(arguments, config, out, device)
    else:
        (corpus, target, texts), supervised, given = own_target(arguments, config, out, device), None, None
    last = STAGES.index(stage or "table")
    if last <= STAGES.index("text"):
        return

    def phase_one():
        head = stages.copy_of(given, target) if given else stages.new_head(
            config, target, texts if supervised is None else texts[supervised])
        return head, stages.train_head("draft", config, target, head, texts, config.head_steps, 1.0,
                                       config.head_batch, config.seed, out, supervised=supervised)

    head = given if given and stage != "draft" else head_in(out, "draft", device, target, phase_one)
    if last == STAGES.index("draft"):
        return

    heads = {"draft": [head], "control": [], "gto": []}
    for number in range(config.seeds):
        seed, gto_name, control_name = config.seed + number, run_name("gto", number), run_name("control", number)

        def phase_two():
            student = stages.copy_of(head, target)
            return student, stages.train_head(gto_name, config, target, student, texts, config.gto_steps,
                                              config.gto_rate, config.gto_batch, seed, out, reference=head,
                                              supervised=supervised)

        def continuation():
            student, steps = stages.copy_of(head, target), report.matched_steps(out, config, gto_name)
            return student, stages.train_head(control_name, config, target, student, texts, steps, config.gto_rate,
                                              config.head_batch, seed, out)

        heads["gto"].append(head_in(out, gto_name, device, target, phase_two))
        if corpus:
            heads["control"].append(head_in(out, control_name, device, target, continuation))
    if last == STAGES.index("gto") or not corpus or parallel.rank() > 0:
        return
    if device == "cuda":
        for trained in itertools.chain(*heads.values()):
            cast(trained, torch.bfloat16)
    if last == STAGES.index("ltd"):
        print(ltd.run(config, target, {name: heads[name][0] for name in ("draft", "gto")}, corpus, out))
        return
    print(report.table(config, target, heads, corpus, out))


if __name__ == "__main__":
    main_guard(main)
