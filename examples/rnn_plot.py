"""The picture that exploding_rnn.py draws: loss and gradient norm of all of its runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws to a file; needs no screen

import matplotlib.pyplot as plt
from digits_plot import curve, marked, visible
from rnn_run import Run

# Okabe and Ito's colors, which people with any kind of color vision can tell apart.
COLORS = ("#000000", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")

MOST_LOSS = 6.0  # to guess costs ln 103 = 4.6


def plot(runs: Mapping[str, Run], path: Path) -> None:
    figure, (top, bottom) = plt.subplots(2, figsize=(11, 8), sharex=True, layout="constrained")
    for (name, run), color in zip(runs.items(), COLORS, strict=False):
        steps, losses = curve(run.losses)
        style = {"color": color, "linewidth": 1.2}
        lost = f", lost in step {len(run.losses)}" if run.is_lost() else ""
        top.plot(steps, losses, label=f"{name}{lost}", **style)
        norms = [visible(reading.grad_norm) for reading in run.readings]
        bottom.plot(steps, norms, alpha=0.8, **style)
        if run.is_lost():
            style = {"color": color, "markersize": 12, "clip_on": False}
            top.plot(len(losses), MOST_LOSS, "X", transform=top.transData, **style)
        skipped = marked([reading.skipped for reading in run.readings])
        heights = [0.95] * len(skipped)
        bottom.plot(
            skipped, heights, "X", color=color, markersize=8, transform=bottom.get_xaxis_transform()
        )
    top.set_ylabel("training loss, nats a letter")
    top.set_ylim(0, MOST_LOSS)  # the first steps may be far above
    bottom.set(xlabel="step", ylabel="gradient norm before clipping", yscale="log")
    bottom.margins(y=0.15)  # room for the marks of skipped steps
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
    top.legend(loc="upper right", frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
