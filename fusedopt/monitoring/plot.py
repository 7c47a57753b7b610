"""`python -m fusedopt plot LOG`: a run on one page.

from fusedopt.monitoring.plot import draw, history_of

history, reader = history_of("run.jsonl")
draw(history, "my run")  # a notebook shows it
draw(history, "my run").savefig("run.png")
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusedopt.monitoring.history import History
from fusedopt.monitoring.layers import gather
from fusedopt.monitoring.log_reader import LogReader, NotALogError
from fusedopt.monitoring.words import printable, short_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colors, which people with any kind of color vision can tell apart.
BLUE, ORANGE, RED, GREEN = "#0072b2", "#e69f00", "#d55e00", "#009e73"
ABSENT = "#d9d9d9"
MOST_ROWS = 48  # rows of the heat map, at most
MOST_COLUMNS = 1024
MOST_LRS = 32  # lines of learning rates, at most
LONGEST_LABEL, LONGEST_TITLE = 45, 120
DPI = 120
DRAWN = 1e-100, 1e100  # smaller and larger values are drawn as these


def main(argv: Sequence[str]) -> int:
    """Returns the exit status: 2 if there is nothing to draw."""
    parser = argparse.ArgumentParser(
        prog="python -m fusedopt plot", description="Draws the log of a fusedopt.Monitor."
    )
    parser.add_argument("log", type=Path, help="a .jsonl or .csv file")
    parser.add_argument("-o", "--output", type=Path, help="default: the log's name with .png")
    args = parser.parse_args(argv)
    output = args.output or args.log.with_suffix(".png")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return fail("plot needs matplotlib: pip install matplotlib")
    try:
        history, reader = history_of(args.log)
        if reader.damage:
            print(printable(reader.damage), file=sys.stderr)
        if len(history) == 0:
            return fail(f"{args.log} has no steps yet")
        optimizer = reader.header.optimizer if reader.header else None
        save(draw(history, args.log.name, optimizer), output)
    except NotALogError as error:
        return fail(str(error))
    except OSError as error:
        return fail(f"{error.filename or output}: {error.strerror or error}")
    except ValueError as error:  # a format that matplotlib doesn't know
        return fail(f"{output}: {error}")
    print(f"wrote {printable(str(output))}")
    return 0


def save(figure: Figure, path: Path) -> None:
    with warnings.catch_warnings():
        # The font may lack a letter of a name; a box stands for it.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure.savefig(path, dpi=DPI)


def fail(reason: str) -> int:
    print(f"python -m fusedopt: {printable(reason)}", file=sys.stderr)
    return 2


def history_of(path: str | os.PathLike[str]) -> tuple[History, LogReader]:
    """Reads a log. The returned reader says whether the log is damaged."""
    reader, history = LogReader(path), History(MOST_COLUMNS)
    for batch in reader.batches():
        history.add(batch)
    return history, reader


def draw(history: History, title: str, optimizer: str | None = None) -> Figure:
    """Draws norm, clip coefficient and learning rate over the steps, and the layers below.

    Returns:
        A figure of matplotlib's, which a notebook shows as a picture.

    Raises:
        ValueError: the history has no steps.
    """
    from fusedopt.monitoring.notebook_figure import NotebookFigure

    if len(history) == 0:
        raise ValueError("history has no steps; expected at least one")
    rows = gather(history.names, MOST_ROWS)
    heights = [3.0, 1.3, 1.3, max(1.2, 0.5 + 0.17 * len(rows))]
    figure = NotebookFigure(figsize=(12, 1.2 + sum(heights)), layout="constrained")
    norm, coef, lr, layers = figure.subplots(4, sharex=True, height_ratios=heights)
    lines = f"{short_name(title, LONGEST_TITLE)}\n{summary(history, optimizer)}"
    figure.suptitle(lines, fontsize=11, parse_math=False)
    draw_norm(norm, history)
    draw_coef(coef, history)
    draw_lr(lr, history)
    draw_layers(layers, history, rows)
    half = history.width / 2
    norm.set_xlim(history.first - half, history.first + history.width * len(history) - half)
    layers.set_xlabel("step" if history.width == 1 else f"step ({history.width} to a point)")
    return figure


def summary(history: History, optimizer: str | None) -> str:
    total, clipped, skipped, bad = (
        int(history[name].sum()) for name in ("steps", "clipped", "skipped", "nonfinite")
    )
    parts = [short_name(optimizer)] if optimizer else []
    parts.append(f"{total:,} steps")
    parts.append(f"{clipped:,} clipped ({clipped / total:.1%})")
    parts.append(f"{skipped:,} skipped")
    parts += [f"{bad:,} updated with inf or nan"] if bad else []
    parts.append(f"{len(history.names):,} parameter{'s' * (len(history.names) != 1)}")
    return ", ".join(parts)


def positive(values: Tensor) -> Tensor:
    """Values for a logarithmic axis: 0 and less become gaps, and so do inf and nan.

    matplotlib computes with margins around the values, which must not overflow.
    """
    shown = values.clamp(*DRAWN)
    return shown.masked_fill(~(values > 0) | ~values.isfinite(), torch.nan)


def draw_norm(axes: Axes, history: History) -> None:
    x = history.starts()
    largest, smallest = positive(history["norm_max"]), positive(history["norm_min"])
    if history.width > 1:
        label = "smallest to largest"
        axes.fill_between(x, smallest, largest, color=BLUE, alpha=0.3, linewidth=0, label=label)
    marker = "." if len(history) < 50 else None
    label = "norm" if history.width == 1 else "largest"
    axes.plot(x, largest, color=BLUE, linewidth=1, marker=marker, label=label)
    clipped = history["clipped"] > 0
    style: Any = {"color": ORANGE, "label": "clipped"}
    if 0 < clipped.sum() <= len(history) / 4:
        axes.scatter(x[clipped], largest[clipped], s=12, zorder=3, **style)
    elif clipped.any():  # a mark on each would hide the line
        bottom: Any = {"transform": axes.get_xaxis_transform(), "width": history.width}
        axes.bar(x[clipped], 0.03, **bottom, **style)
    mark_at_top(axes, x[history["skipped"] > 0], "X", RED, "skipped")
    mark_at_top(axes, x[history["nonfinite"] > 0], "v", "black", "inf or nan, not skipped")
    if (largest > 0).any():
        axes.set_yscale("log")
    axes.margins(y=0.15)  # room for the marks
    finish(axes, "gradient norm\nbefore clipping")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=5, frameon=False, borderpad=0)


def mark_at_top(axes: Axes, x: Tensor, marker: str, color: str, label: str) -> None:
    if len(x):
        style: Any = {"marker": marker, "s": 45, "color": color, "zorder": 4, "label": label}
        style |= {"linewidths": 0.5, "edgecolors": "white", "clip_on": False}
        axes.scatter(x, torch.full((len(x),), 0.95), transform=axes.get_xaxis_transform(), **style)


def draw_coef(axes: Axes, history: History) -> None:
    coef = positive(history["coef_min"])
    axes.plot(history.starts(), coef, color=ORANGE, linewidth=1, drawstyle="steps-mid")
    if (coef < 0.01).any():
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, 1.05)
    share = "" if history.width == 1 else "\n(smallest)"
    finish(axes, f"clip\ncoefficient{share}")


def draw_lr(axes: Axes, history: History) -> None:
    """The groups with the same learning rate in all steps share a line."""
    lrs: dict[bytes, tuple[int, Tensor]] = {}
    for group, lr in enumerate(history["lr"].unbind(1)):
        lrs.setdefault(lr.numpy().tobytes(), (group, lr))
    shown = list(lrs.values())[:MOST_LRS]
    drawn = [
        lr.masked_fill(~lr.isfinite(), torch.nan).clamp(-DRAWN[1], DRAWN[1]) for _, lr in shown
    ]
    for (group, _), lr in zip(shown, drawn):
        color = GREEN if group == 0 else None
        axes.plot(history.starts(), lr, color=color, linewidth=1, label=f"group {group}")
    if 1 < len(shown) <= 8:
        axes.legend(loc="upper right", fontsize=7, ncols=4)
    if drawn and not (torch.stack(drawn) < 0).any():
        axes.set_ylim(bottom=0)
    finish(axes, "learning\nrate")


def draw_layers(axes: Axes, history: History, rows: list[tuple[str, list[int]]]) -> None:
    """A row for every parameter or module, and in it the largest norm of a gradient."""
    from matplotlib.colors import ListedColormap, LogNorm
    from matplotlib.patches import Patch

    if not rows:
        finish(axes, "no parameters")
        return
    largest, bad = history["param_max"], history["param_bad"]
    largest = largest[_last_logged(history, bad)]
    norms = torch.stack([_nanmax(largest[:, members]) for _, members in rows])
    broken = torch.stack([(bad[:, members] == 1).any(1) for _, members in rows])
    first, last = history.first, history.first + history.width * len(history)
    half = history.width / 2
    place: Any = {"extent": (first - half, last - half, len(rows) - 0.5, -0.5), "aspect": "auto"}
    place |= {"interpolation": "nearest"}
    axes.set_facecolor(ABSENT)
    shown = positive(norms)
    seen = shown[shown > 0]
    if len(seen):
        # The few smallest share a color, so that the others can be told apart.
        low, high = float(seen.sort().values[len(seen) // 100]), float(seen.max())
        colors = LogNorm(min(low, high / 10), high)  # positive: see DRAWN
        picture = axes.imshow(shown.numpy(), norm=colors, cmap="viridis", **place)
        bar = axes.figure.colorbar(picture, ax=axes, pad=0.01, aspect=15, extend="min")
        bar.set_label("gradient norm")
    absent = norms.isnan() & ~broken
    handles: list[Any] = [Patch(color=ABSENT, label="no gradient")] if absent.any() else []
    if broken.any():
        # A cell may be narrower than a pixel: a mark is not.
        axes.imshow(_only(broken), cmap=ListedColormap([RED]), **place)
        row, column = broken.nonzero().unbind(1)
        style: Any = {"marker": "X", "s": 40, "color": RED, "linewidths": 0.5, "zorder": 3}
        style |= {"edgecolors": "white", "clip_on": False, "label": "inf or nan"}
        handles.append(axes.scatter(history.starts()[column], row, **style))
    text: Any = {"fontsize": 7, "parse_math": False}  # a name may hold a $
    axes.set_yticks(range(len(rows)), [label_of(*row) for row in rows], **text)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    legend: Any = {"loc": "lower left", "bbox_to_anchor": (0, 1), "frameon": False}
    axes.legend(handles=handles, ncols=2, borderpad=0, **legend)


def _last_logged(history: History, bad: Tensor) -> Tensor:
    """For every interval, the last interval up to it in which parameters were logged."""
    logged = ~bad.isnan().all(1) | (history["norm_max"] == 0)
    return torch.where(logged, torch.arange(len(history)), 0).cummax(0).values


def _only(cells: Tensor) -> Any:
    """A picture that shows the set cells only."""
    return torch.where(cells, 0.0, torch.nan).numpy()


def label_of(name: str, members: list[int]) -> str:
    short = short_name(name, LONGEST_LABEL)
    return short if len(members) == 1 or name.endswith("more") else f"{short} ({len(members)})"


def _nanmax(values: Tensor) -> Tensor:
    largest = values.masked_fill(values.isnan(), -torch.inf).amax(1)
    return largest.masked_fill(largest == -torch.inf, torch.nan)


def finish(axes: Axes, label: str) -> None:
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
