"""The picture that train_digits.py draws: loss and gradient norm over the steps of its runs.

Usage:
    plot({"fused-adam": run}, Path("training.png"))
    plot({"fused-adam": one_run, "adam": other_run}, Path("explode.png"))
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws to a file; needs no screen

import matplotlib.pyplot as plt
from digits_run import Run
from matplotlib.axes import Axes

COLORS = ("#0072b2", "#d55e00")  # blue and vermilion, which all people can tell apart


def plot(runs: Mapping[str, Run], path: Path) -> None:
    figure, (top, bottom) = plt.subplots(
        2, figsize=(10, 7), sharex=True, layout="constrained", height_ratios=(3, 2)
    )
    for (name, run), color in zip(runs.items(), COLORS, strict=False):
        draw_loss(top, name, run, color)
        draw_norm(bottom, name, run, color)
    for axes in (top, bottom):
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
    top.set_ylabel("loss")
    bottom.set(xlabel="step", ylabel="gradient norm before clipping")
    bottom.margins(y=0.15)  # room for the marks of skipped steps
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_loss(axes: Axes, name: str, run: Run, color: str) -> None:
    loss = run.steps["loss"]
    lost = next((step for step, value in enumerate(loss, 1) if not math.isfinite(value)), None)
    note = f" (not finite from step {lost})" if lost else ""
    axes.plot(*curve(loss), color=color, alpha=0.4, linewidth=1, label=f"{name}: training{note}")
    ends = [epoch["step"] for epoch in run.epochs]
    test = [visible(epoch["test_loss"]) for epoch in run.epochs]
    axes.plot(ends, test, "o-", color=color, markersize=4, label=f"{name}: test")


def draw_norm(axes: Axes, name: str, run: Run, color: str) -> None:
    norm = run.steps["grad_norm"]
    axes.plot(*curve(norm), color=color, alpha=0.5, linewidth=1, label=name)

    clipped = marked(run.steps["clipped"])
    if clipped:
        heights = [visible(norm[step - 1]) for step in clipped]
        label = f"{name}: clipped ({len(clipped)} steps)"
        axes.plot(clipped, heights, ".", color=color, markersize=5, label=label)

    skipped = marked(run.steps["skipped"])
    if skipped:  # their norm is infinite: put the marks at the top of the picture
        label = f"{name}: skipped ({len(skipped)} steps)"
        top = axes.get_xaxis_transform()
        heights = [0.95] * len(skipped)
        axes.plot(skipped, heights, "X", color=color, markersize=8, transform=top, label=label)


def marked(flags: list[float]) -> list[int]:
    return [step for step, flag in enumerate(flags, 1) if flag]


def curve(values: list[float]) -> tuple[range, list[float]]:
    """The points to draw: steps count from 1."""
    return range(1, len(values) + 1), [visible(value) for value in values]


def visible(value: float) -> float:
    """Values that a logarithmic axis can't show become gaps."""
    return value if 0 < value < math.inf else math.nan
