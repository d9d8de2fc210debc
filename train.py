"""From nothing to the paper's comparison: data, target, draft head, its continuation, GTO, a table.

    python train.py                      everything, in 10 to 20 minutes on two CPU cores
    python train.py --preset smoke       every step of the way in half a minute
    python train.py --omega 0.3 --out-dir out/omega     any number of gto/config.py is a flag

For a released chat model (gto/released/README.md), which writes the conversations to learn from itself, or takes yours:

    python train.py --target smollm2                        SmolLM2-135M, the same comparison in an hour
    python train.py --target Qwen3-8B --data chat.jsonl --head EAGLE3-head --stage gto      GTO from a finished head
A finished stage is not run again, an interrupted one goes on where it was."""
from dataclasses import fields, replace
from pathlib import Path

import gto  # noqa: F401  before torch: it sets the thread environment
import torch

from gto import config as configs, evaluate
from gto.checkpoint import (exists, load_encoding, load_head, load_target, load_texts, remember_config, run_folder,
                            save, seconds_of)
from gto.data import Corpus, ensure_data
from gto.loss import OBJECTIVES
from gto.training import Stage, Texts, copy_of, new_head, train_head, train_target, write_texts
from gto.util import UserError, argument_parser, main_guard, rank, ranks, start, wait


def parse_arguments():
    parser = argument_parser("python train.py", __doc__, "--device")
    parser.add_argument("--preset", choices=configs.PRESETS, help="default: what fits the device")
    parser.add_argument("--stage", choices="target text draft gto table".split(), default="table", help="stop after it")
    parser.add_argument("--out-dir", help="where checkpoints, log and table go (default: out, or out/<target>)")
    parser.add_argument("--data", help="a directory of prepare_data.py (default: data/<dataset>), or a chat .jsonl")
    parser.add_argument("--target", help="smollm2, a GGUF file, or a folder of Hugging Face's files")
    parser.add_argument("--head", help="with --target: start from this head, ours or a folder with an EAGLE-3 head")
    parser.add_argument("--tokenizer", help="with --target: default its folder")
    for field in fields(configs.Config):
        kind = {"True": True, "False": False}.get if field.type is bool else field.type
        parser.add_argument("--" + field.name.replace("_", "-"), type=kind, help="see gto/config.py",
                            choices=configs.CHOICES.get(field.name))
    arguments = parser.parse_args()
    changes = {k: v for k, v in vars(arguments).items() if v is not None and hasattr(configs.Config, k)}
    if arguments.target and arguments.data and not Path(arguments.data).is_file():
        raise UserError(f"--data {arguments.data}: no such chat .jsonl")
    if not arguments.target and (arguments.head or arguments.tokenizer):
        raise UserError("--head and --tokenizer are for a released target: add --target FOLDER")
    start(arguments.device)
    preset = arguments.preset or configs.fitting(arguments.device, bool(arguments.target))
    config = configs.check(replace(configs.PRESETS[preset], **changes))
    if unknown := set(config.objectives.split(",")) - set(OBJECTIVES):
        raise UserError(f"--objectives {config.objectives}: no {unknown.pop()!r}, but {', '.join(OBJECTIVES)}")
    return arguments, config


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
    return corpus, load_target(out / "target.pt", device)


def released_target(arguments, config, out):
    """A chat model as downloaded; how it writes chats; a head to start from, if given; texts from a chat .jsonl."""
    from gto.released import chat
    target = load_target(arguments.target, arguments.device)
    head = load_head(arguments.head, target, torch.float32) if arguments.head else None
    source = arguments.tokenizer or arguments.target
    chats, texts = chat.load(source, load_encoding(source)), None
    if arguments.data and not exists(out / "text.pt"):
        texts = chat.encode_conversations(arguments.data, chats, config.length, config.unroll)
    remember_config(out, config, target=Path(arguments.target).name, data=Path(arguments.data or "").name)
    return target, chats, head, texts


def training_texts(config, out, target, corpus, chat, texts):
    """What heads are trained on: what the target writes itself, or the answers in a chat .jsonl."""
    if not exists(out / "text.pt"):
        if corpus:
            texts = write_texts(config, target, corpus)
        elif not texts:
            from gto.released.chat import conversations
            texts = conversations(config, out, target, chat)
        save(out / "text.pt", kind="text", **dict(zip(("tokens", "supervised"), texts)))
    return Texts(*load_texts(out / "text.pt", target), [])


def main():
    torch.set_float32_matmul_precision("high")
    arguments, config = parse_arguments()
    out, last = run_folder(arguments.out_dir, arguments.target), arguments.stage

    # The target, and text to train heads on.
    corpus = chat = given = texts = None
    if arguments.target:
        target, chat, given, texts = released_target(arguments, config, out)
    else:
        corpus, target = own_target(arguments, config, out)
    if last == "target":
        return
    texts = training_texts(config, out, target, corpus, chat, texts)
    if last == "text":
        return

    # Phase I: token-level training. A finished head may take its place, or be where it starts.
    if not exists(out / "draft.pt") and (given is None or last == "draft"):
        head = copy_of(given, target) if given else new_head(config, target, texts)
        stage = Stage("draft", config.head_steps, config.head_batch, seed=config.seed)
        train_head(stage, config, target, head, texts, out)
    draft = given if given and last != "draft" else load_head(out / "draft.pt", target)
    if last == "draft":
        return

    # Phase II: Group Tree Optimization; in the time that it took, at phase I's pace, other objectives and the control,
    # phase I continued.
    compared = last == "table" and not given and ranks() == 1
    first, *others = config.objectives.split(",")
    suffixes = [f"-{number + 1}" if number else "" for number in range(config.seeds)]  # gto.pt, gto-2.pt, ..
    for seed, suffix in enumerate(suffixes, config.seed):
        for name in (first, *others, "control") if compared else (first,):
            if exists(out / f"{name}{suffix}.pt"):
                continue
            steps, batch = config.gto_steps, config.gto_batch
            if name != first:
                share = seconds_of(out, f"{first}{suffix}") / seconds_of(out, "draft")
                steps, batch = max(1, round(share * config.head_steps)), config.head_batch
            stage = Stage(f"{name}{suffix}", steps, batch, config.gto_rate, seed)
            train_head(stage, config, target, copy_of(draft, target), texts, out, OBJECTIVES.get(name), draft)
    if not compared:
        return

    # The comparison.
    heads = {name: [load_head(out / f"{name}{suffix}.pt", target, target.norm.weight.dtype)
                    for suffix in (suffixes if name != "draft" else [""])]
             for name in ("draft", "control", first, *others)}
    if corpus:
        prompts, stop, encoding = corpus.prompt_ids(config.eval_prompts * 5 // 4), (), load_encoding(out)
    else:
        from gto.released.chat import held_out
        prompts, stop, encoding = held_out(config, out, target, chat), chat.stops, chat.encoding
    print(evaluate.report(config, target, heads, out, prompts, encoding, stop))


if __name__ == "__main__":
    main_guard(main)
