"""One training loop for every stage: schedule, clipping, progress bar, log, checkpoints, resume."""
import json
import time
from pathlib import Path

import torch
from tqdm import tqdm

from gto import parallel
from gto.checkpoint import save
from gto.errors import UserError


def append_log(path, **record):
    """One JSON object a line."""
    if parallel.rank() > 0:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as f:
        f.write(json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in record.items()}) + "\n")


def learning_rate(step, steps, warmup):
    """Factor of the peak rate: linear warm-up, then linear to zero."""
    return min((step + 1) / max(warmup, 1), (steps - step) / max(steps - warmup, 1), 1.0)


def train(name, model, optimizers, loss_of, steps, out, warmup=20, clip=1.0, device="cpu", autocast=None, every=200,
          accumulate=1):
    """Run `steps` optimiser steps; what an interrupted run needs to go on is kept in out/name.partial.pt.

    loss_of(part) -> (loss, {figure: value}); a step takes the mean over its `accumulate` parts, numbered on through the
    training, and over the ranks of a torchrun. It must be a pure function of `part`, the rank and the model, its
    randomness seeded by the step: then a resumed run equals an uninterrupted one bit for bit (on a CPU).
    optimizers: their `lr` is the peak. Returns the seconds that the training took, interruptions left out.
    """
    partial = Path(out) / f"{name}.partial.pt"
    start, seconds = 0, 0.0
    if partial.exists():
        try:
            state = torch.load(partial, map_location="cpu", weights_only=True)   # the optimisers move their own
            model.load_state_dict(state["model"])
            for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
        except Exception as error:
            raise UserError(f"cannot resume from {partial} ({type(error).__name__}): delete it to start the stage anew")
        start, seconds = state["step"], state["seconds"]
        del state
    peaks = [[group.setdefault("peak", group["lr"]) for group in optimizer.param_groups] for optimizer in optimizers]
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=name, unit="step", mininterval=1.0,
               disable=parallel.rank() > 0)
    began = time.perf_counter() - seconds
    model.train()
    for step in bar:
        for optimizer, rates in zip(optimizers, peaks):
            for group, peak in zip(optimizer.param_groups, rates):
                group["lr"] = peak * learning_rate(step, steps, warmup)
        sums = {}
        for part in range(step * accumulate, (step + 1) * accumulate):
            with torch.autocast(device, dtype=autocast, enabled=autocast is not None):
                loss, figures = loss_of(part)
            (loss / accumulate).backward()
            for figure, value in {"loss": loss, **figures}.items():
                sums[figure] = sums.get(figure, 0) + value.detach() / accumulate
        parallel.average([p.grad for p in model.parameters() if p.grad is not None])
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step % 10 == 9 or step == steps - 1:
            values = torch.stack([*sums.values(), norm])
            parallel.average([values])
            figures = dict(zip([*sums, "norm"], values.tolist()))
            bar.set_postfix({k: f"{v:.3f}" for k, v in figures.items()})
            append_log(Path(out) / "log.jsonl", stage=name, step=step + 1, seconds=time.perf_counter() - began, **figures)
        if step % every == every - 1 and step < steps - 1:
            save(partial, model=model.state_dict(), optimizers=[o.state_dict() for o in optimizers], step=step + 1,
                 seconds=time.perf_counter() - began)
    model.eval()
    return time.perf_counter() - began


def finish(name, out):
    """The stage's model is saved: what would resume it is no longer needed."""
    (Path(out) / f"{name}.partial.pt").unlink(missing_ok=True)
