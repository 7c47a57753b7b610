"""`python -m fusedopt watch LOG`: a run in the terminal, while it lasts."""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusedopt.monitoring.history import History
from fusedopt.monitoring.log_reader import LogReader, NotALogError
from fusedopt.monitoring.log_rows import Block, Rows, join
from fusedopt.monitoring.plot import fail
from fusedopt.monitoring.words import printable, short_name
from fusedopt.telemetry import PARAM_COLUMNS
from fusedopt.telemetry.explain import NAMED, and_more

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

BARS = "▁▂▃▄▅▆▇█"
ASCII_BARS = "_.:-=+*#"  # for terminals that lack the others
WINDOW = 256  # the number of recent steps
MOST_SKIPS = 5
MOST_LAYERS = 12
MOST_LRS = 8
MOST_NUMBERS = 2**22  # of recent measurements; a model with many parameters gets fewer steps
NOTHING_YET = "no steps yet"
NO_LOG_YET = "there is no such file yet; waiting for it"


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
        "--interval", type=_seconds, default=1.0, help="seconds between looks (default: 1)"
    )
    args = parser.parse_args(argv)
    try:
        from rich.console import Console
    except ImportError:
        return fail("watch needs rich: pip install rich")
    console = Console(markup=False, highlight=False, emoji=False)  # names may hold brackets
    view = View(args.log, BARS if _can_print(BARS, console.encoding) else ASCII_BARS)
    try:
        if args.once or not console.is_terminal:
            view.update()
            _print(view.render(console.width), console)
        else:
            _follow(view, console, args.interval)
    except KeyboardInterrupt:
        return 0
    except NotALogError as error:
        return fail(str(error))
    except OSError as error:
        return fail(f"{args.log}: {error.strerror or error}")
    return 0


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 86400:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 86400")
    return value


_seconds.__name__ = "float"  # argparse says "invalid float value"


def _can_print(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _print(shown: RenderableType, console: Console) -> None:
    """Prints the text. A question mark replaces a character that the output's encoding lacks."""
    with console.capture() as capture:
        console.print(shown)
    encoding = console.encoding
    console.file.write(capture.get().encode(encoding, "replace").decode(encoding))


def _follow(view: View, console: Console, interval: float) -> None:
    """Shows the log until Ctrl-C. Waits for a log that doesn't exist yet."""
    from rich.live import Live

    # A question mark replaces a character that the terminal's encoding lacks.
    if isinstance(console.file, io.TextIOWrapper):
        console.file.reconfigure(errors="replace")
    with Live(console=console, auto_refresh=False) as live:
        while True:
            with contextlib.suppress(FileNotFoundError):  # not there yet, or about to be replaced
                view.update()
            live.update(view.render(console.width), refresh=True)
            time.sleep(max(0.05, interval))


class View:
    """The view of a run: an outline of all steps, and details of the last ones."""

    def __init__(self, path: Path, bars: str = BARS) -> None:
        self._reader = LogReader(path)
        self._bars = bars
        self._restart()

    def _restart(self) -> None:
        self._history = History()
        self._recent: Rows | None = None
        self._skips: deque[str] = deque(maxlen=MOST_SKIPS)

    def update(self) -> None:
        """Reads the new lines. A file that was replaced is read from its start."""
        if self._reader.was_replaced():
            self._restart()
        for rows in self._reader.batches(growing=True):
            self._history.add(rows)
            if len(rows.step) == 0:
                continue
            known = [rows] if self._recent is None else [self._recent, rows]
            self._recent = last_rows(join([_with_few_groups(part) for part in known]))
            for i in rows.skipped.nonzero().flatten()[-MOST_SKIPS:].tolist():
                self._skips.append(f"step {int(rows.step[i]):,}: {culprits(rows, i)}")

    def render(self, width: int) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        history, recent = self._history, self._recent
        header = self._reader.header
        title = Text(printable(str(self._reader.path)), style="bold")
        if header is not None:
            optimizer = short_name(header.optimizer or "")
            title.append(f"  {optimizer}  {count(len(header.params), 'parameter')}", "dim")
        parts: list[Any] = [title]
        if recent is None:
            there = self._reader.path.exists()
            parts.append(Text(NOTHING_YET if there else NO_LOG_YET))
        else:
            parts += [self._table(history, recent, width), Text(""), layers_table(recent)]
        if self._skips:
            parts.append(Text(f"\nlast skips, of {int(history['skipped'].sum()):,}:"))
            parts += [Text(f"  {skip}", style="red") for skip in reversed(self._skips)]
        if self._reader.damage:
            parts.append(Text(f"\n{printable(self._reader.damage)}", style="yellow"))
        return Group(*parts)

    def _table(self, history: History, recent: Rows, width: int) -> Any:
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
            table.add_row(label, sparkline(values, room, self._bars))
        coef = recent.clip_coef
        clipped = ((coef < 1) & ~recent.skipped).double().mean()
        table.add_row("clip coefficient", f"{coef[-1]:.4g}   {clipped:.0%} of recent steps clipped")
        skipped = int(recent.skipped.sum())
        table.add_row("skipped", f"{skipped} of {count(len(recent.step), 'recent step')}")
        broken = int((~norms.isfinite() & ~recent.skipped).sum())
        if broken:
            table.add_row("inf or nan", f"{count(broken, 'recent step')} not skipped", style="red")
        lrs = recent.lr[-1].tolist()
        table.add_row("learning rate", ", ".join(f"{lr:.4g}" for lr in lrs))
        return table


def _with_few_groups(rows: Rows) -> Rows:
    return replace(rows, lr=rows.lr[:, :MOST_LRS])


def last_rows(rows: Rows) -> Rows:
    """The last rows, with the last measurements of the parameters."""
    mask = torch.arange(len(rows.step)) >= len(rows.step) - WINDOW
    rows = rows.select(mask)
    blocks: list[Block] = []
    room = MOST_NUMBERS
    for block in reversed(rows.blocks):
        if len(block.rows) == 0:
            continue
        kept = min(len(block.rows), max(1, room // max(1, block.values[0].numel())))
        blocks.append(Block(block.sizes, block.rows[-kept:], block.values[-kept:].clone()))
        room -= blocks[-1].values.numel()
        if room <= 0:
            break
    return replace(rows, blocks=blocks[::-1])


def count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def spread(norms: Tensor) -> str:
    finite = norms[norms.isfinite()]
    if len(finite) == 0:
        return "no recent norm is finite"
    low, middle, high = finite.min(), finite.median(), finite.max()
    return f"recent: {low:.4g} to {high:.4g}, median {middle:.4g}"


def sparkline(values: Tensor, room: int, bars: str = BARS) -> str:
    """Bars on a logarithmic scale. If there is too little room, neighbors share the largest's bar.

    `!` stands where no value was finite.
    """
    size = -(-len(values) // room)
    padded = torch.nn.functional.pad(values, (0, -len(values) % size), value=torch.nan)
    largest = padded.view(-1, size).nan_to_num(-math.inf).amax(1)
    logs = largest.clamp(min=1e-30).log()
    seen = logs[largest > 0]
    if len(seen) == 0:
        return "!" * len(largest) if (largest < 0).all() else bars[0] * len(largest)
    low, high = seen.min(), seen.max()
    places = ((logs - low) / (high - low).clamp(min=0.1) * (len(bars) - 1)).round()
    return "".join(
        "!" if value < 0 else bars[max(0, int(place))] for value, place in zip(largest, places)
    )


def culprits(rows: Rows, index: int) -> str:
    """The parameters whose gradients held inf or nan in one step."""
    for block in rows.blocks:
        for row in (block.rows == index).nonzero().flatten().tolist():
            infs, nans = (block.values[row, PARAM_COLUMNS.index(name)] for name in ("infs", "nans"))
            bad = ((infs > 0) | (nans > 0)).nonzero().flatten().tolist()
            if bad:
                params = list(block.sizes)
                names = [short_name(params[i]) for i in bad[:NAMED]]
                return f"inf or nan in {', '.join(names)}{and_more(len(bad) - NAMED)}"
    return "no parameter with inf or nan: a gradient scaler's overflow, or not logged"


@dataclass(frozen=True)
class LayerRow:
    """The gradient of one parameter in the recent steps."""

    name: str
    bad: int  # steps with inf or nan
    last: float  # the last norm
    usual: float  # the median of the finite norms
    update: float  # the last update as a share of the parameter's norm

    @property
    def growth(self) -> float:
        return self.last / self.usual if self.usual > 0 else math.nan

    def sort_key(self) -> tuple[int, float]:
        return -self.bad, -self.growth if math.isfinite(self.growth) else 0.0


def layer_rows(recent: Rows) -> list[LayerRow]:
    """The parameters of the last header that has measurements, in its order."""
    blocks = [block for block in recent.blocks if len(block.rows)]
    if not blocks:
        return []
    names = list(blocks[-1].sizes)
    values = torch.cat([b.values for b in blocks if list(b.sizes) == names])
    norm, _, infs, nans, update, size = values.unbind(1)
    logged = ~infs.isnan()
    bad = ((infs > 0) | (nans > 0)).sum(0)
    usual = norm.masked_fill(~norm.isfinite(), torch.nan).nanmedian(0).values
    ratio = torch.where(update == 0, 0.0, update / size)
    columns = (bad, _last_where(logged, norm), usual, _last_where(ratio > 0, ratio))
    rows = zip(names, *(column.tolist() for column in columns), logged.any(0).tolist())
    return [LayerRow(*row) for *row, known in rows if known]


def _last_where(mask: Tensor, values: Tensor) -> Tensor:
    """The last value of each column at which the mask is set; nan if there is none."""
    last = (mask * torch.arange(1, len(mask) + 1)[:, None]).amax(0)
    found = values.gather(0, (last - 1).clamp(min=0)[None])[0]
    return found.masked_fill(last == 0, torch.nan)


def layers_table(recent: Rows) -> Any:
    """The parameters with inf or nan first, then those whose gradients grew most."""
    from rich.table import Table

    rows = sorted(layer_rows(recent), key=LayerRow.sort_key)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("parameter", no_wrap=True)
    for title in ("norm", "median", "grown", "update ratio", "inf or nan"):
        table.add_column(title, justify="right")
    for row in rows[:MOST_LAYERS]:
        broken = row.bad or not math.isfinite(row.last)
        style = "red" if broken else "yellow" if row.growth > 10 else ""
        cells = [f"{row.last:.3g}", f"{row.usual:.3g}", f"{row.growth:.2f}x", f"{row.update:.2g}"]
        shown = ["-" if cell.startswith("nan") else cell for cell in cells]
        last = count(row.bad, "step") if row.bad else ""
        table.add_row(short_name(row.name), *shown, last, style=style)
    if len(rows) > MOST_LAYERS:
        table.add_row(f"... {len(rows) - MOST_LAYERS} more", style="dim")
    return table
