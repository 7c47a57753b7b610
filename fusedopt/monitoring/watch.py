"""`python -m fusedopt watch LOG`: a run in the terminal, while it lasts."""

from __future__ import annotations

import argparse
import contextlib
import math
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusedopt.monitoring.history import History
from fusedopt.monitoring.log_reader import LogReader, NotALogError
from fusedopt.monitoring.plot import fail
from fusedopt.monitoring.telemetry_rows import concatenate, select
from fusedopt.telemetry import Telemetry
from fusedopt.telemetry.explain import NAMED, and_more, nonfinite_params

if TYPE_CHECKING:
    from rich.console import RenderableType

BARS = "▁▂▃▄▅▆▇█"
WINDOW = 256  # steps that what is called recent looks back on
MOST_SKIPS = 5
MOST_LAYERS = 12
NOTHING_YET = "no steps yet"


def main(argv: Sequence[str]) -> int:
    """Returns the exit status: 2 if there is nothing to see."""
    parser = argparse.ArgumentParser(
        prog="python -m fusedopt watch",
        description="Shows the log of a fusedopt.Monitor as it grows. Ctrl-C ends it.",
    )
    parser.add_argument("log", type=Path, help="a .jsonl or .csv file")
    parser.add_argument(
        "--once", action="store_true", help="print it once and exit, as into a pipe"
    )
    parser.add_argument(
        "--interval", type=float, default=1.0, help="seconds between looks (default: 1)"
    )
    args = parser.parse_args(argv)
    try:
        from rich.console import Console
        from rich.live import Live
    except ImportError:
        return fail("watch needs rich: pip install 'fusedopt[watch]'")
    console = Console(markup=False, highlight=False, emoji=False)  # names may hold brackets
    view = View(args.log)
    try:
        view.update()
        if args.once or not console.is_terminal:
            console.print(view.render(console.width))
            return 0
        with Live(view.render(console.width), console=console, auto_refresh=False) as live:
            while True:
                time.sleep(max(0.05, args.interval))
                with contextlib.suppress(FileNotFoundError):  # about to be replaced
                    view.update()
                live.update(view.render(console.width), refresh=True)
    except KeyboardInterrupt:
        return 0
    except NotALogError as error:
        return fail(str(error))
    except OSError as error:
        return fail(f"{args.log}: {error.strerror or error}")


class View:
    """What is known of a run: all of it in outline, and its last steps whole."""

    def __init__(self, path: Path) -> None:
        self._reader = LogReader(path)
        self._restart()

    def _restart(self) -> None:
        self._history = History()
        self._recent: Telemetry | None = None
        self._skips: deque[str] = deque(maxlen=MOST_SKIPS)

    def update(self) -> None:
        """Reads what is new. A file that was replaced is read from its start."""
        if self._reader.was_replaced():
            self._restart()
        for rows in self._reader.batches(growing=True):
            self._history.add(rows)
            last = select(rows, slice(-WINDOW, None))
            known = [last] if self._recent is None else [self._recent, last]
            self._recent = select(concatenate(known), slice(-WINDOW, None))
            for i in rows.skipped.nonzero().flatten()[-MOST_SKIPS:].tolist():
                self._skips.append(f"step {int(rows.step[i]):,}: {culprits(rows, i)}")

    def render(self, width: int) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        history, recent = self._history, self._recent
        header = self._reader.header
        title = Text(str(self._reader.path), style="bold")
        if header is not None:
            title.append(
                f"  {header.optimizer or ''}  {count(len(header.params), 'parameter')}", "dim"
            )
        parts: list[Any] = [title]
        if recent is None:
            parts.append(Text(NOTHING_YET))
        else:
            parts += [self._table(history, recent, width), Text(""), layers_table(recent)]
        if self._skips:
            parts.append(Text(f"\nlast skips, of {int(history['skipped'].sum()):,}:"))
            parts += [Text(f"  {skip}", style="red") for skip in reversed(self._skips)]
        if self._reader.damage:
            parts.append(Text(f"\n{self._reader.damage}", style="yellow"))
        return Group(*parts)

    @staticmethod
    def _table(history: History, recent: Telemetry, width: int) -> Any:
        from rich.table import Table

        norms = recent.grad_norm
        table = Table.grid(padding=(0, 2))
        table.add_row("step", f"{int(recent.step[-1]):,}")
        table.add_row("gradient norm", f"{norms[-1]:.4g}   {spread(norms)}")
        room = max(10, min(width - 20, 100))
        for label, values in (
            ("  recent", norms.masked_fill(~norms.isfinite(), torch.nan)),
            ("  all steps", history["norm_max"]),
        ):
            table.add_row(label, sparkline(values, room))
        coef = recent.clip_coef
        clipped = ((coef < 1) & ~recent.skipped).double().mean()
        table.add_row("clip coefficient", f"{coef[-1]:.4g}   {clipped:.0%} of recent steps clipped")
        skipped = int(recent.skipped.sum())
        table.add_row("skipped", f"{skipped} of {count(len(recent.step), 'recent step')}")
        broken = int((~norms.isfinite() & ~recent.skipped).sum())
        if broken:
            table.add_row("inf or nan", f"{count(broken, 'recent step')} not skipped", style="red")
        table.add_row("learning rate", ", ".join(f"{lr:.4g}" for lr in recent.lr[-1].tolist()[:8]))
        return table


def count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def spread(norms: Tensor) -> str:
    finite = norms[norms.isfinite()]
    if len(finite) == 0:
        return "none of the recent ones is finite"
    low, middle, high = finite.min(), finite.median(), finite.max()
    return f"recent: {low:.4g} to {high:.4g}, median {middle:.4g}"


def sparkline(values: Tensor, room: int) -> str:
    """Bars on a logarithmic scale, the largest of neighbors where there are more than bars.

    `!` is where nothing was finite.
    """
    size = -(-len(values) // room)
    padded = torch.nn.functional.pad(values, (0, -len(values) % size), value=torch.nan)
    largest = padded.view(-1, size).nan_to_num(-math.inf).amax(1)
    logs = largest.clamp(min=1e-30).log()
    seen = logs[largest > 0]
    if len(seen) == 0:
        return "!" * len(largest) if (largest < 0).all() else BARS[0] * len(largest)
    low, high = seen.min(), seen.max()
    places = ((logs - low) / (high - low).clamp(min=0.1) * (len(BARS) - 1)).round()
    return "".join(
        "!" if value < 0 else BARS[max(0, int(place))] for value, place in zip(largest, places)
    )


def culprits(rows: Telemetry, index: int) -> str:
    """The parameters whose gradients held inf or nan in one step."""
    names = nonfinite_params(rows, index)
    if not names:
        return "no parameter with inf or nan: a gradient scaler's overflow, or not logged"
    return f"inf or nan in {', '.join(names[:NAMED])}{and_more(len(names) - NAMED)}"


def layers_table(recent: Telemetry) -> Any:
    """The parameters with inf or nan first, then those whose gradients grew most."""
    from rich.table import Table

    rows = []
    for name, param in recent.params.items():
        logged = ~param.infs.isnan()
        if not logged.any():
            continue
        bad = int(((param.infs > 0) | (param.nans > 0)).sum())
        norms = param.grad_norm[logged]
        finite = norms[norms.isfinite()]
        usual = float(finite.median()) if len(finite) else math.nan
        last = float(norms[-1])
        growth = last / usual if usual > 0 else math.nan
        ratios = param.update_ratio[logged]
        ratio = ratios[ratios > 0]
        update = float(ratio[-1]) if len(ratio) else math.nan
        rows.append((bad, growth, name, last, usual, update))
    rows.sort(key=lambda row: (-row[0], -row[1] if math.isfinite(row[1]) else 0.0))
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("parameter", no_wrap=True)
    for title in ("norm", "median", "grown", "update ratio", "inf or nan"):
        table.add_column(title, justify="right")
    for bad, growth, name, last, usual, update in rows[:MOST_LAYERS]:
        style = "red" if bad or not math.isfinite(last) else "yellow" if growth > 10 else ""
        cells = [f"{last:.3g}", f"{usual:.3g}", f"{growth:.2f}x", f"{update:.2g}"]
        shown = ["-" if cell.startswith("nan") else cell for cell in cells]
        table.add_row(name, *shown, count(bad, "step") if bad else "", style=style)
    if len(rows) > MOST_LAYERS:
        table.add_row(f"... {len(rows) - MOST_LAYERS} more", style="dim")
    return table
