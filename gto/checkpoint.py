"""A run's folder, where what is finished is there whole and not made again; the doors to targets, heads and tokenizers,
ours or released ones (by gto/released). Under torchrun all ranks call these functions together; rank 0 writes."""
import io
import json
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from gto.config import Config, check
from gto.head import DraftHead, HeadConfig
from gto.model import ModelConfig, Target, cast
from gto.tokenizer import end_of_text_id, make_encoding, read_own_meta, read_ranks
from gto.util import UserError, append_log, compute_dtype, rank, reading, wait, write_whole


def save(path, **contents):
    if rank() == 0:
        whole = io.BytesIO()                                      # torch.save would not say that the disk is full
        torch.save(contents, whole)
        write_whole(path, whole.getbuffer())
    wait()


def read(path, kind, device="cpu"):
    """The contents of a checkpoint of this kind; a UserError if it is anything else."""
    with reading(f"{path}, which python {'-m gto.ltd' if kind == 'policy' else 'train.py'} writes,"):
        contents = torch.load(path, map_location=device, weights_only=True)
        if contents["kind"] != kind:
            raise UserError(f"it holds a {contents['kind']}, a {kind} is needed here")
        if not all(weight.isfinite().all() for weight in contents.get("model", {}).values()):
            raise UserError("it holds weights that are infinite or no numbers")
    return contents


def load_target(path, device="cpu", dtype=None):
    """A frozen target: a checkpoint *.pt of train.py, or as downloaded, a folder, a *.gguf or "smollm2". dtype, or its
    name; None: by the device."""
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or compute_dtype(device)
    if Path(path).suffix != ".pt":
        from gto.released import load
        return load.load_target(path, device, dtype)
    contents = read(path, "target", device)
    with reading(path):
        target = Target(ModelConfig(**contents["config"])).to(device)
        target.load_state_dict(contents["model"])
    return cast(target, dtype).eval().requires_grad_(False)


def load_head(path, target, dtype=None):
    """A frozen draft head for this target, on its device: a *.pt of train.py, or a folder with an EAGLE-3 head."""
    if Path(path).suffix != ".pt":
        from gto.released import load
        return load.load_head(path, target, dtype)
    device = target.norm.weight.device
    contents = read(path, "head", device)
    with reading(path):
        head = DraftHead(HeadConfig(**contents["config"]).check_fits(target), target).to(device)
        head.load_state_dict(contents["model"])
    return cast(head, dtype).eval().requires_grad_(False)


def load_texts(path, target):
    """What heads for this target are trained on: tokens, supervised [n, T], see `gto.training.Texts`."""
    contents = read(path, "text")
    with reading(path):
        tokens, supervised = contents["tokens"], contents["supervised"]
        if (tokens.dim(), tokens.is_floating_point(), supervised.dtype) != (2, False, torch.bool) or not (
                tokens.shape == supervised.shape and 0 <= tokens.min() <= tokens.max() < target.config.vocab_size):
            raise UserError("its texts are not of this target")
    return tokens, supervised


def load_encoding(source):
    """The tokenizer of a data directory or run, of a released model (its folder, a file *.json, *.model or *.gguf,
    "smollm2"), or one that tiktoken downloads by name ("gpt2"). Encode what a user wrote by `encode_ordinary`: special
    tokens are plain text; a rendered chat template by `encode(text, allowed_special="all")`."""
    folder = Path(source).parent if Path(source).suffix in (".pt", ".model") else Path(source)
    meta, path = read_own_meta(folder), folder / "tokenizer.model"
    if meta and (ranks := read_ranks(path)):                      # written by prepare_data.py or train.py
        with reading(f"{path}, or meta.json beside it,"):
            encoding = make_encoding(str(path), meta["pattern"], ranks, meta["special_tokens"], meta["normalizer"])
            if (len(ranks), encoding.n_vocab) != (meta.get("ranks", len(ranks)), meta["vocab_size"]):
                raise UserError("they contradict each other")
            return encoding
    from gto.released import tokenizers
    return tokenizers.load(path if Path(source).suffix == ".pt" else source)


def load_run(arguments):
    """What the flags of decode.py and the wings name. -> the folder of the heads; the target; its tokenizer; a function
    [text, ...] -> ids of questions and answers in turn, up to the next answer; the tokens that end an answer."""
    out = run_folder(arguments.out_dir, arguments.target)
    path = arguments.target or out / "target.pt"
    target = load_target(path, arguments.device, arguments.dtype)
    source = arguments.tokenizer or path
    encoding = load_encoding(source)
    if not arguments.chat:                                        # text follows text
        return out, target, encoding, lambda texts: encoding.encode_ordinary("".join(texts)), {end_of_text_id(encoding)}
    from gto.released import chat
    template = chat.load(source, encoding)
    return out, target, encoding, partial(chat.encode_turns, template), template.stops


def remember_config(out, config, corpus=None, **inputs):
    """Write out/config.json, and the corpus' tokenizer and prompts beside it, so that decoding needs nothing else.
    UserError if the folder was begun with other numbers or inputs."""
    path, now = out / "config.json", {**asdict(config), **inputs}
    if rank() == 0:
        with reading(path):
            before = {**asdict(Config()), **inputs, **json.loads(path.read_text())} if path.exists() else now
        if changed := [name for name in before | now if before.get(name) != now.get(name)]:
            raise UserError(f"{path} has another {', '.join(changed)}: choose another --out-dir")
        for name in ("tokenizer.model", "prompts.jsonl", "meta.json") if corpus else ():
            write_whole(out / name, Path(corpus.directory, name).read_bytes())
        write_whole(path, json.dumps(now, indent=1))
    wait()


def load_config(out):
    """The Config that train.py wrote to this folder."""
    path = Path(out, "config.json")
    with reading(f"{path}, which python train.py writes,"):
        kept = {**json.loads(path.read_text())}                   # of a released target, with the names of its inputs
        return check(Config(**{name: kept[name] for name in kept if name not in ("target", "data")}))


def main_head(out):
    """The head to decode with: the last objective's, or, if training stopped before, what there is of it."""
    paths = [out / f"{name}.pt" for name in reversed(("draft", *load_config(out).objectives.split(",")))]
    return next((path for path in paths if path.exists()), paths[0])


def run_folder(out_dir, target):
    """Where a target's heads are: in out_dir if given, beside a checkpoint, in out/<name> of a released one, or out."""
    if out_dir or not target:
        return Path(out_dir or "out")
    path = Path(target)
    return path.parent if path.suffix == ".pt" else Path("out", path.name.removesuffix(".gguf"))


def exists(path):
    """As all ranks find it: none goes on to write before all have looked."""
    found = Path(path).exists()
    wait()
    return found


def finish(name, model, out, **record):
    """A stage is complete: log it, save its model, and drop what would have resumed it."""
    append_log(out / "log.jsonl", stage=name, finished=True, **record)
    kind = "head" if isinstance(model, DraftHead) else "target"
    save(out / f"{name}.pt", kind=kind, config=asdict(model.config), model=model.state_dict())
    (out / f"{name}.partial.pt").unlink(missing_ok=True)


def read_log(out):
    """The lines of a run's log.jsonl, see `append_log`."""
    with reading(path := Path(out, "log.jsonl")):
        return [dict(json.loads(line)) for line in path.read_text().splitlines()]


def seconds_of(out, stage):
    """How long a finished stage took."""
    finished = [line for line in read_log(out) if line.get("stage") == stage and line.get("finished")]
    with reading(Path(out, "log.jsonl")):
        return float(finished[-1]["seconds"])
