"""Charts of results. They are legible on light and dark pages, and without seeing colors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from benchmarks.comparisons import CEILING
from benchmarks.peers import OUR_TELEMETRY, OURS
from benchmarks.results import Row, median_seconds, ratio
from benchmarks.tables import by_case

GRAY = "#808080"  # legible on white and on black
# Okabe and Ito's colors, each with its own marker.
STYLES: dict[str, tuple[str, str]] = {
    OURS: ("#D55E00", "o"),
    OUR_TELEMETRY: ("#D55E00", "d"),
    "torch fused": ("#0072B2", "s"),
    "torch foreach": ("#56B4E9", "D"),
    "torch for-loop": ("#009E73", "^"),
    "torch compiled": ("#CC79A7", "v"),
    "DeepSpeed": ("#E69F00", "P"),
    "bitsandbytes": (GRAY, "X"),
    "optimi": (GRAY, "<"),
    "torchao 8-bit": (GRAY, "*"),
    "Apex": ("#F0E442", "p"),
    "flashoptim 8-bit": (GRAY, "h"),
    CEILING: (GRAY, ""),
}
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "fusedopt",  # the same results give the same file
    "text.color": GRAY,
    "axes.labelcolor": GRAY,
    "axes.edgecolor": GRAY,
    "xtick.color": GRAY,
    "ytick.color": GRAY,
    "grid.color": GRAY,
    "grid.alpha": 0.3,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
}
WIDTH = 8.5  # inches: a README is about as wide

Dots = dict[str, tuple[float, float, float]]  # by side: quartiles


def draw_ratios(report: dict[str, Any], path: Path) -> None:
    """Every side's time divided by ours, by case."""
    cases = {}
    for ours, sides in shown(report):
        peers = {side: row for side, row in sides.items() if side in STYLES}
        dots = {
            side: ratio(row, ours) for side, row in peers.items() if side not in (OURS, CEILING)
        }
        cases[ours["case"]] = dots
    figure, axes = new_figure(rows=len(cases))
    draw_dots(axes, cases)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.axvline(1, color=STYLES[OURS][0], linewidth=1.5)
    axes.set_xlabel("time of a step, fusedopt = 1 (line: interquartile range over the rounds)")
    finish(figure, axes, report, path)


def draw_ceiling(report: dict[str, Any], path: Path) -> bool:
    """Each side's share of the measured ceiling, by case. Returns False if there is no ceiling."""
    cases = {}
    for ours, sides in shown(report):
        if CEILING not in sides:
            continue
        shares: Dots = {}
        for side, row in sides.items():
            if side in STYLES and side != CEILING:
                low, middle, high = ratio(sides[CEILING], row)
                shares[side] = (100 * low, 100 * middle, 100 * high)
        cases[ours["case"]] = shares
    if not cases:
        return False
    figure, axes = new_figure(rows=len(cases))
    draw_dots(axes, cases)
    axes.axvline(100, color=GRAY, linestyle="--", linewidth=1)
    axes.set_xlim(left=0)
    axes.set_xlabel("% of the speed of the bare memory traffic of a fused step")
    finish(figure, axes, report, path)
    return True


def draw_sweep(report: dict[str, Any], path: Path) -> None:
    """Time against the elements of one tensor, and against the number of tensors."""
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, 2, figsize=(WIDTH, 3.6), sharey=True)
    rows = report["rows"]
    totals = {row["elements"] for row in rows if row["tensors"] > 1}
    for axes, key, chosen in (
        (panels[0], "elements", [row for row in rows if row["workload"].startswith("one tensor")]),
        (panels[1], "tensors", [row for row in rows if row["elements"] in totals]),
    ):
        for side in dict.fromkeys(row["side"] for row in chosen):
            line = sorted((row for row in chosen if row["side"] == side), key=lambda row: row[key])
            color, marker = STYLES[side]
            style = "--" if side == CEILING else "-"
            axes.plot([row[key] for row in line], [median_seconds(row) * 1e3 for row in line],
                      style, color=color, marker=marker, markersize=5, label=side)  # fmt: skip
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.grid(True)
    panels[0].set_xlabel("elements in one tensor")
    panels[1].set_xlabel(f"tensors that hold {max(totals):,} elements" if totals else "tensors")
    panels[0].set_ylabel("milliseconds a step")
    finish(figure, panels[0], report, path)


def shown(report: dict[str, Any]) -> Iterator[tuple[Row, dict[str, Row]]]:
    """The cases that a chart has room for: all threads; for most optimizers only clipped."""
    most_threads = max(row["threads"] for row in report["rows"])
    for ours, sides in by_case(report["rows"]):
        telling = ours["optimizer"] == "AdamW" or ours["mode"] == "clip"
        if telling and ours["threads"] == most_threads:
            yield ours, sides


def new_figure(rows: int) -> tuple[Figure, Axes]:
    with plt.rc_context(STYLE):
        return plt.subplots(figsize=(WIDTH, 1.3 + 0.24 * rows))


def draw_dots(axes: Axes, cases: dict[str, Dots]) -> None:
    for y, dots in enumerate(cases.values()):
        for side, (low, middle, high) in dots.items():
            color, marker = STYLES[side]
            axes.plot([low, high], [y, y], color=color, linewidth=1.5, alpha=0.7)
            axes.plot(middle, y, marker, color=color, markersize=6, label=side)
    axes.set_yticks(range(len(cases)), list(cases))
    axes.invert_yaxis()
    axes.margins(y=0.02)
    axes.grid(True)


def finish(figure: Figure, axes: Axes, report: dict[str, Any], path: Path) -> None:
    """Puts the legend on top, and hardware and date below; removes the background."""
    by_side = dict(zip(*reversed(axes.get_legend_handles_labels())))
    ordered = [side for side in STYLES if side in by_side]
    with plt.rc_context(STYLE):
        figure.legend([by_side[side] for side in ordered], ordered, loc="upper center", ncols=5,
                      frameon=False, bbox_to_anchor=(0.5, 1.0))  # fmt: skip
        rows_of_legend = -(-len(ordered) // 5)
        origin = f"{report['hardware']}, torch {report['versions']['torch']}, {report['date'][:10]}"
        figure.text(0.99, 0.01, origin, ha="right", va="bottom", fontsize=7)
        height = figure.get_size_inches()[1]
        top = 1 - (0.22 * rows_of_legend + 0.1) / height
        figure.tight_layout(rect=(0, 0.15 / height, 1, top))
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, transparent=True, metadata={"Date": None})
    plt.close(figure)
