"""The benchmark's figure: how many drafts a cycle accepts, and where its time goes. Needs matplotlib."""
import os
from pathlib import Path

from gto.errors import UserError


def check(path):
    """UserError unless `draw` can write this file: matplotlib is optional, and the suffix names the format."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise UserError("--plot needs a package: pip install matplotlib") from None
    formats = FigureCanvasBase.get_supported_filetypes()
    if Path(path).suffix[1:] not in formats:
        raise UserError(f"--plot {path}: the name must end in one of .{', .'.join(formats)}")


def draw(report, path):
    """The report of `gto.bench.benchmark` as a figure."""
    check(path)
    from matplotlib.figure import Figure
    rows = report["rows"]
    names = [f"{row['method']}, T={row['T']:g}" for row in rows]
    figure = Figure(figsize=(12, 1.5 + 0.4 * max(len(rows), 6)), layout="constrained")
    accepted, split = figure.subplots(1, 2)
    for name, row in zip(names, rows):
        if "pruned" in row:                                       # plain decoding accepts nothing, always
            accepted.plot(row["accepted"], marker="o", linestyle="-" if row["T"] == 0 else "--",
                          label=f"{name}: tau {row['tau']:.2f}")
    accepted.set(xlabel="drafts accepted in a cycle", ylabel="share of cycles", ylim=(0, None))
    accepted.legend(fontsize="small")
    left = [0.0] * len(rows)
    for part in ("draft", "verify", "rest"):
        width = [max(row[f"{part}_ms"], 0.0) for row in rows]     # a rest below zero is noise of the clock
        split.barh(names, width, left=left, label=part)
        left = [a + b for a, b in zip(left, width)]
    split.invert_yaxis()
    split.set(xlabel="ms per cycle")
    split.legend(fontsize="small")
    temporary = Path(path).with_suffix(".tmp" + Path(path).suffix)
    figure.savefig(temporary, dpi=150)
    os.replace(temporary, path)
