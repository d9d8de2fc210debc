"""One directory holds one experiment: its numbers are written once, and what is finished is not made again.

Under torchrun all ranks call these together; rank 0 writes.
"""
import json
from dataclasses import asdict

from gto import checkpoint, parallel
from gto.config import Config
from gto.errors import UserError
from gto.trainer import append_log, finish


def remember_config(out, config, **inputs):
    """Write out/config.json; a UserError if the directory was begun with other numbers or inputs."""
    path, now = out / "config.json", {**asdict(config), **inputs}
    if parallel.rank() == 0:
        if path.exists():
            before = {**asdict(Config()), **inputs, **json.loads(path.read_text())}
            changed = [name for name, value in now.items() if before[name] != value]
            if changed:
                raise UserError(f"{out} was trained with another {', '.join(changed)}: choose another --out-dir, or delete"
                                f" it")
        out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(now, indent=1))
    parallel.wait()


def run_name(method, number):
    """Phase II is repeated with several seeds; the first run's files bear the method's plain name: gto.pt, gto-2.pt."""
    return method if number == 0 else f"{method}-{number + 1}"


def texts_in(out, make):
    """out/text.pt, written if it is not there yet. make() -> {"tokens" [n, T], "supervised" [n, T] bool if not all}."""
    if not parallel.exists(out / "text.pt"):
        checkpoint.save(out / "text.pt", kind="text", **make())
    texts = checkpoint.read(out / "text.pt", "text")
    return texts["tokens"], texts.get("supervised")


def head_in(out, name, device, target, make):
    """The head out/name.pt; trained by `make() -> (head, seconds)` and saved if it is not there yet."""
    path = out / f"{name}.pt"
    if not parallel.exists(path):
        head, seconds = make()
        append_log(out / "log.jsonl", stage=name, finished=True, seconds=seconds)
        checkpoint.save_model(path, head)
        finish(name, out)
    return checkpoint.load_head(path, target, device)
