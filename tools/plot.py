"""Draw training runs: loss against training tokens and against time.

python tools/plot.py runs/token_model runs/student --output runs/loss.png
"""

from __future__ import annotations

import argparse
import reprlib
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no screen needed
import matplotlib.pyplot as plt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter

from configs.errors import UserError, run_cli
from configs.files import read_json_lines


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl. Raises UserError when there are none."""
    path = Path(run) / "metrics.jsonl"
    try:
        lines = read_json_lines(path)
    except FileNotFoundError:
        raise UserError(f"no run in {run}: {path} cannot be read (no such file)") from None
    if not any("loss" in line for line in lines):
        raise UserError(f"{path} holds no training steps yet")
    for line in lines:
        if not all(isinstance(line.get(key), (int, float)) for key in ("step", "tokens", "time")):
            raise UserError(f"{path} is damaged: expected the numbers step, tokens and time, got {reprlib.repr(line)}")
    return lines


def loss_curves(runs: dict[str, str | Path], path: str | Path, key: str = "ce") -> None:
    """Training `key` (nats a token) of named runs against tokens and against minutes of training."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    for name, run in runs.items():
        lines = read_metrics(run)
        if not (steps := [m for m in lines if key in m]):
            has = sorted({name for m in lines if "loss" in m for name in m} - {"step", "tokens", "time", "tokens_per_s"})
            raise UserError(f"{run} has no {key!r} to draw: expected one of {', '.join(has)}")
        for axis, x in zip(axes, ([m["tokens"] / 1e6 for m in steps], [m["time"] / 60 for m in steps]), strict=True):
            axis.plot(x, [m[key] for m in steps], label=name)
    for axis, label in zip(axes, ("training tokens, millions", "minutes"), strict=True):
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("training loss, nats per token")
    axes[0].legend()
    _save(figure, path)


def nll_by_position(figures: dict[str, list[float]], path: str | Path) -> None:
    """Validation NLL at in-chunk positions 1..K of named models."""
    figure, axis = plt.subplots(figsize=(6, 4))
    for name, values in figures.items():
        axis.plot(range(1, len(values) + 1), values, marker="o", label=name)
    axis.set_xlabel("position in the chunk")
    axis.set_ylabel("validation NLL, nats per token")
    axis.grid(alpha=0.3)
    axis.legend()
    _save(figure, path)


def quality_curves(curves: dict[str, list[list[tuple[float, ...]]]], path: str | Path) -> None:
    """NLL of named variants, as their trainers measured it, against training tokens, training FLOPs and training time.

    curves: of each variant one line a seed, of points (tokens, FLOPs, seconds, nats a token).
    """
    figure, axes = plt.subplots(1, 3, figsize=(15, max(4.5, len(curves) / 5)), sharey=True)  # as tall as the names
    labels = (("training tokens, millions", 1e6), ("training PFLOPs", 1e15), ("training minutes", 60))
    for number, (name, lines) in enumerate(curves.items()):
        for seed, points in enumerate(lines):
            for i, (axis, (_, unit)) in enumerate(zip(axes, labels, strict=True)):
                xs, ys = [point[i] / unit for point in points], [point[3] for point in points]
                style = ("-", "--", ":", "-.")[number // 10 % 4]  # there are ten colours
                axis.plot(xs, ys, style, marker=".", color=f"C{number % 10}", label=None if seed else name)
    for axis, (label, _) in zip(axes, labels, strict=True):
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")  # the ends lie close together, far below where they all begin
    axes[0].yaxis.set_major_locator(MaxNLocator(12, steps=[1, 2, 2.5, 5, 10]))
    axes[0].yaxis.set_major_formatter(ScalarFormatter())
    axes[0].yaxis.set_minor_locator(NullLocator())
    axes[0].set_ylabel("NLL on the trainer's validation windows, nats a token")
    axes[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    _save(figure, path)


def frontier(points: dict[str, tuple[float, float]], path: str | Path) -> None:
    """Named variants at (runs of the backbone a token, bits per byte); names above one another keep the points' order."""
    figure, axis = plt.subplots(figsize=(7, 4.5))
    heights = [bits for _, bits in points.values()]
    gap = (max(heights) - min(heights)) / 25  # a line of text
    free: dict[float, float] = {}  # by runs: where the next name has room
    for name, (steps, bits) in sorted(points.items(), key=lambda item: item[1][1]):
        axis.plot(steps, bits, "o", color="C0")
        at = max(bits, free.get(steps, bits))
        axis.annotate(name, (steps, bits), xytext=(steps * 1.08, at), fontsize=8, va="center")
        free[steps] = at + gap
    axis.set_xscale("log", base=2)
    axis.set_xlabel("runs of the backbone for one token")
    axis.set_ylabel("validation bits per byte")
    axis.margins(x=0.2)
    axis.set_xlim(right=3 * max(steps for steps, _ in points.values()))  # room for the last names
    axis.grid(alpha=0.3)
    _save(figure, path)


def _save(figure: Any, path: str | Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110, bbox_inches="tight")  # labels that stand out of the axes count
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run folders")
    parser.add_argument("--output", default="loss.png", help="[loss.png]")
    parser.add_argument("--key", default="ce", help="which part of the loss [ce]")
    args = parser.parse_args()
    kinds = FigureCanvasAgg.get_supported_filetypes()
    if Path(args.output).is_dir() or Path(args.output).suffix.lstrip(".").lower() not in kinds:
        raise UserError(f"--output {args.output}: expected a file to write that ends in one of .{', .'.join(sorted(kinds))}")
    names = [Path(run).name for run in args.runs]
    if len(set(names)) < len(names):  # of two experiments
        names = args.runs
    loss_curves(dict(zip(names, args.runs, strict=True)), args.output, args.key)
    print(args.output)


if __name__ == "__main__":
    run_cli(main)
