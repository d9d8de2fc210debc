"""Our own checkpoints: {kind, config, model}, safe to load, complete or absent."""
import os
from dataclasses import asdict
from pathlib import Path

import torch

from gto import parallel
from gto.errors import UserError
from gto.head import DraftHead, HeadConfig
from gto.model import ModelConfig, Target


def save(path, **contents):
    """Write to a temporary file and rename it: a crash leaves the old checkpoint or the new one, never half of one.

    Called by all ranks of a torchrun: one writes, and no one returns before the file is there.
    """
    if parallel.rank() == 0:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        torch.save(contents, temporary)
        os.replace(temporary, path)
    parallel.wait()


def save_model(path, model):
    kind = "head" if isinstance(model, DraftHead) else "target"
    save(path, kind=kind, config=asdict(model.config), model=model.state_dict())


def read(path, kind, device="cpu"):
    """The contents of a checkpoint of this kind; a UserError if it is anything else."""
    path = Path(path)
    if not path.exists():
        stage = " --stage ltd" if kind == "policy" else ""
        raise UserError(f"{path} does not exist: make it with python train.py{stage}, or name another file")
    try:
        contents = torch.load(path, map_location=device, weights_only=True)
        found = contents["kind"]
    except Exception as error:
        raise UserError(f"{path} is not a checkpoint of this project, or is cut short ({type(error).__name__})")
    if found != kind:
        raise UserError(f"{path} holds a {found}, a {kind} is needed here")
    return contents


def load_target(path, device="cpu"):
    contents = read(path, "target", device)
    target = Target(ModelConfig(**contents["config"])).to(device)
    target.load_state_dict(contents["model"])
    return target.eval().requires_grad_(False)


def load_head(path, target, device="cpu"):
    contents = read(path, "head", device)
    config = HeadConfig(**contents["config"])
    if config.target_dim != target.config.dim or config.vocab_size != target.config.vocab_size:
        raise UserError(f"{path} was trained for another target: {config.target_dim} wide with {config.vocab_size} tokens,"
                        f" this one has {target.config.dim} and {target.config.vocab_size}")
    head = DraftHead(config, target).to(device)
    head.load_state_dict(contents["model"])
    return head.eval()
