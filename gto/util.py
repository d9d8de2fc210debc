"""Small things that everything uses: bad input, files, the one table, the ranks of a torchrun."""
import argparse
import atexit
import json
import os
import sys
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import distributed

from kernels import is_modern

MOST = 2**32 - 1    # no number of a flag is larger


class UserError(Exception):
    """Something the user can mend: the message says what is wrong and what to do."""


def main_guard(main):
    """Run `main()` as a program: bad input, a file out of reach, a full GPU are one line on stderr and status 2."""
    sys.stdout.reconfigure(errors="replace")                       # a prompt may be of any bytes
    try:
        return main()
    except (UserError, OSError, torch.OutOfMemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted; finished stages and checkpoints are kept", file=sys.stderr)
        sys.exit(130)
    sys.exit(2)


def at_least(least, kind=int):
    """A type for `add_argument`: an int or float from `least` to MOST."""
    def number(text):                                             # argparse says "invalid number value" if `kind` fails
        if not least <= (value := kind(text)) <= MOST:
            raise argparse.ArgumentTypeError(f"{text} is not from {least} to {MOST}")
        return value
    return number


FLAGS = {"--device": {"default": "cuda" if torch.cuda.is_available() else "cpu"},    # of several programs
         "--dtype": {"choices": ("float32", "bfloat16", "float16"), "help": "default: what the device is fast at"},
         "--out-dir": {"help": "where train.py left target, heads and prompts (default: out, or out/<target>)"},
         "--target": {"help": "a target checkpoint, smollm2, a GGUF file, or a folder as downloaded"},
         "--tokenizer": {"help": "default: the target's folder"},
         "--chat": {"action": "store_true", "help": "prompts are questions to a chat model"},
         "--seed": {"type": at_least(0), "default": 0},
         "--report": {"metavar": "FILE.html", "help": "write a page that steps through a decode"}}


def argument_parser(command, description, *flags):
    """An ArgumentParser with these FLAGS, whose complaints are UserErrors. command: as in "python train.py"."""
    parser = argparse.ArgumentParser(prog=command, description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(message):
        raise UserError(f"{message} ({command} --help shows all flags)")

    parser.error = error
    for flag in flags:
        parser.add_argument(flag, **FLAGS[flag])
    return parser


@contextmanager
def reading(source):
    """Whatever goes wrong inside, with what is in a file, as a UserError of one line that names the source."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ModuleNotFoundError as error:
        raise UserError(f"{source} needs a package to be read: pip install {error.name.split('.')[0]}") from None
    except FileNotFoundError:
        raise UserError(f"{source} does not exist") from None
    except Exception as error:                                    # each parser, and each template, has its own
        why = error if isinstance(error, UserError) else f"{error!r:.200}"
        raise UserError(f"{source} is damaged, or of a kind not known here: {why}") from None


def table(rows):
    """Rows [{column: text or number}] -> Markdown. Columns in the order they first come; a row may lack some."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [[row.get(column, "") for column in columns] for row in rows]
    cells = [[f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row] for row in cells]
    return "\n".join("| " + " | ".join(row) + " |" for row in [columns, ["---"] * len(columns), *cells])


def write_whole(path, data):
    """Write bytes or text to a temporary file, then rename: a crash leaves the old file or the new one, whole."""
    temporary = Path(f"{path}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def append_log(path, **record):
    """One JSON object a line, a whole one or none."""
    if rank() == 0:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in record.items()}) + "\n"
        with open(path, "ab", buffering=0) as file:
            if (written := file.write(line.encode())) < len(line):                    # the disk is full
                os.truncate(path, file.tell() - written)
                raise UserError(f"cannot write to {path}: no space left; what was finished before is kept")


def synchronize(device):
    """Wait for the device. -> the time, in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def compute_dtype(device):
    """What models compute in if nobody says: bfloat16 on a GPU that has it (older ones emulate it and crawl, whatever
    torch.cuda.is_bf16_supported() says), else float32. Not float16: without a scaler its gradients vanish."""
    return torch.bfloat16 if is_modern(torch.device(device)) else torch.float32


def one_thread_if_small(target):
    """For decoding one sequence on a CPU: a small target's products are over before a second thread is awake (measured:
    twice as slow with two). A large one's, and training's, want all threads."""
    if target.norm.weight.device.type == "cpu" and sum(p.numel() for p in target.parameters()) < 30_000_000:
        torch.set_num_threads(1)


def start(device):
    """Begin work on a device, under torchrun as one of several ranks, each on a GPU of its own, of which rank 0 writes
    and prints. UserError if tensors cannot live there."""
    if device != "cpu" and not device.startswith("cuda"):
        raise UserError(f"--device {device}: must be cpu or cuda, or cuda:1 and so on for one of several")
    several = distributed.is_torchelastic_launched()
    own = f"cuda:{os.environ['LOCAL_RANK']}" if several and device == "cuda" else device
    try:
        if (found := torch.zeros(1, device=own).device).type == "cuda":
            torch.cuda.set_device(found)                           # where kernels are launched, and what "cuda" is now
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {own}: {str(error).splitlines()[0]}") from None
    if several:
        # Now, because its default arguments are the group there is at import. They would keep it alive, and gloo's
        # threads with it, till after the interpreter, which aborts if one of them is still busy.
        from torch.distributed.nn import functional  # noqa: F401
        distributed.init_process_group("nccl" if device == "cuda" else "gloo")
        atexit.register(distributed.destroy_process_group)
        if rank() > 0:
            sys.stdout = open(os.devnull, "w")


def rank():
    return distributed.get_rank() if distributed.is_initialized() else 0


def ranks():
    return distributed.get_world_size() if distributed.is_initialized() else 1


def wait():
    """Until all ranks are here."""
    if ranks() > 1:
        distributed.barrier()


def average(tensors):
    """Replace each tensor by its mean over all ranks, in place."""
    for tensor in tensors if ranks() > 1 else ():
        distributed.all_reduce(tensor)
        tensor /= ranks()
