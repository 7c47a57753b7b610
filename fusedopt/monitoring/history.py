"""A run of any length in bounded memory: intervals of steps, each with its extremes."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fusedopt.monitoring.log_rows import Block, Rows, not_replaced
from fusedopt.telemetry import PARAM_COLUMNS

INTERVALS = 1024  # at most; before there are more, neighbors are merged
MOST_CELLS = 2**22  # in a column with a value per parameter; many parameters get fewer intervals

# How the values of one interval are combined: the start value, and the function that adds one.
REDUCTIONS = {
    "max": (-math.inf, torch.maximum),
    "min": (math.inf, torch.minimum),
    "sum": (0.0, torch.add),
}
COLUMNS = {
    "norm_max": "max",
    "norm_min": "min",
    "coef_min": "min",
    "steps": "sum",
    "clipped": "sum",
    "skipped": "sum",
    "nonfinite": "sum",
    "lr": "max",
    "param_max": "max",
    "param_bad": "max",
}
WIDE = ("lr", "param_max", "param_bad")  # several values for every interval


class History:
    """Intervals of `width` steps each, from step `first` on.

    `history["norm_max"]` is a float64 tensor with a value for each interval up to the last step's.
    A value is nan if the interval has no data.

    * norm_max, norm_min: the largest and smallest finite global norm.
    * coef_min: the smallest clip coefficient.
    * lr: the largest learning rates; shape (intervals, groups).
    * steps, clipped, skipped, nonfinite: the numbers of all steps, of clipped steps, of skipped
      steps, and of steps that updated the parameters with inf or nan.
    * param_max: the largest finite gradient norm of every parameter; shape (intervals, parameters),
      in the order of `names`.
    * param_bad: 1 if a gradient of the parameter held inf or nan, 0 if none did.
    """

    def __init__(self, most_intervals: int = INTERVALS) -> None:
        self._most = most_intervals
        self._indices: dict[str, int] = {}  # the columns of the parameters, by name
        self._last_sizes: Mapping[str, int] = {}
        self._last_where = torch.empty(0, dtype=torch.int64)
        self._groups = 0
        self._restart(0)

    def _restart(self, first: int) -> None:
        self.first, self.last, self.width = first, first - 1, 1
        self._used = torch.zeros(self._most, dtype=torch.bool)  # the intervals with steps
        self._columns = {name: _Column(kind) for name, kind in COLUMNS.items()}

    @property
    def names(self) -> list[str]:
        return list(self._indices)

    def __len__(self) -> int:
        return (self.last - self.first) // self.width + 1

    def __getitem__(self, name: str) -> Tensor:
        column, used = self._columns[name], self._used[: len(self)]
        values = torch.full((len(self), column.width), column.start, dtype=torch.float64)
        values[used] = column.values[used.nonzero().flatten(), : column.width]
        if column.start != 0:
            values.masked_fill_(values == column.start, torch.nan)
        return values if name in WIDE else values[:, 0]

    def starts(self) -> Tensor:
        """The first step of every interval: int64."""
        return self.first + self.width * torch.arange(len(self))

    def add(self, rows: Rows) -> None:
        """Adds rows of later steps. Rows of earlier steps replace all rows from there on.

        If only a part of an interval is replaced, its old values still count.
        """
        where = [self._where(block) for block in rows.blocks]
        rows = rows.select(not_replaced(rows.step))
        if len(rows.step) == 0:
            return
        self._groups = max(self._groups, rows.lr.shape[1])
        first = int(rows.step[0])
        if self.last < self.first or first <= self.first:
            self._restart(first)
        elif first <= self.last:
            self._used[-(-(first - self.first) // self.width) :] = False
        self.last = int(rows.step[-1])
        self._make_room()
        places = (rows.step - self.first) // self.width
        self._use(places)
        for name, values in _readings(rows).items():
            self._columns[name].add(places, values, slice(0, values.shape[1]))
        for block, columns in zip(rows.blocks, where):
            if len(block.rows):
                for name, values in _measurements(block).items():
                    self._columns[name].add(places[block.rows], values, columns)

    def _where(self, block: Block) -> Tensor:
        """The columns of a block's parameters, new ones included."""
        if block.sizes is not self._last_sizes:
            indices = [self._indices.setdefault(n, len(self._indices)) for n in block.sizes]
            self._last_where = torch.tensor(indices, dtype=torch.int64)
            self._last_sizes = block.sizes
        return self._last_where

    def _make_room(self) -> None:
        """Widens columns for new parameters, and merges intervals to limit the cells."""
        widths = dict.fromkeys(COLUMNS, 1)
        widths |= {
            "lr": self._groups,
            **dict.fromkeys(("param_max", "param_bad"), len(self._indices)),
        }
        capacity = {
            name: column.capacity_for(widths[name]) for name, column in self._columns.items()
        }
        most = max(1, min(self._most, MOST_CELLS // max(capacity.values())))
        self._lengthen_intervals(most)
        for name, column in self._columns.items():
            column.resize(most, capacity[name], widths[name], self._used[:most])

    def _lengthen_intervals(self, most: int) -> None:
        factor = 1
        while (self.last - self.first) // (self.width * factor) >= most:
            factor *= 2
        if factor == 1:
            return
        before = self._used.nonzero().flatten()
        places = before // factor
        for column in self._columns.values():
            column.merge(before, places)
        self._used[:] = False
        self._used[places] = True
        self.width *= factor

    def _use(self, places: Tensor) -> None:
        new = places[~self._used[places]]
        for column in self._columns.values():
            column.values[new] = column.start
        self._used[places] = True


class _Column:
    """One or several numbers for every interval. Rows of unused intervals are undefined.

    Attributes:
        values: float64, shape (intervals, capacity), of which the first `width` columns count.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.start, self._combine = REDUCTIONS[kind]
        self.values = torch.empty((0, 0), dtype=torch.float64)
        self.width = 0

    def capacity_for(self, width: int) -> int:
        """At least twice as many columns as before, if more are needed."""
        capacity = self.values.shape[1]
        return capacity if width <= capacity else max(width, 2 * capacity)

    def resize(self, intervals: int, capacity: int, width: int, used: Tensor) -> None:
        """Makes room. New values of used intervals are `start`."""
        self.width = max(self.width, width)
        before = self.values
        if before.shape == (intervals, capacity):
            return
        self.values = torch.empty((intervals, capacity), dtype=torch.float64)
        rows = used.nonzero().flatten()
        self.values[rows] = self.start
        self.values[rows, : before.shape[1]] = before[rows]

    def add(self, places: Tensor, new: Tensor, where: Tensor | slice) -> None:
        """Adds rows of values to the intervals at these places, which are ascending."""
        place, lengths = places.unique_consecutive(return_counts=True)
        new = torch.segment_reduce(new, self.kind, lengths=lengths, axis=0, initial=self.start)
        cells = (place[:, None], where) if isinstance(where, Tensor) else (place, where)
        self.values[cells] = self._combine(self.values[cells], new)

    def merge(self, rows: Tensor, places: Tensor) -> None:
        """Moves the values of these rows to these places, which are ascending."""
        if len(rows) == 0:
            return
        place, lengths = places.unique_consecutive(return_counts=True)
        merged = torch.segment_reduce(
            self.values[rows], self.kind, lengths=lengths, axis=0, initial=self.start
        )
        self.values[place] = merged


def _readings(rows: Rows) -> dict[str, Tensor]:
    """The values of the columns for every row: float64, shape (steps, 1), or (steps, groups)."""
    norm, coef, skipped = rows.grad_norm, rows.clip_coef, rows.skipped
    finite = norm.isfinite()
    values = {
        "norm_max": norm.masked_fill(~finite, -math.inf),
        "norm_min": norm.masked_fill(~finite, math.inf),
        "coef_min": coef.masked_fill(coef.isnan() | skipped, math.inf),
        "steps": torch.ones_like(norm),
        "clipped": ((coef < 1) & ~skipped).double(),
        "skipped": skipped.double(),
        "nonfinite": (~finite & ~skipped).double(),
    }
    lr = rows.lr.masked_fill(rows.lr.isnan(), -math.inf)
    return {**{name: column[:, None] for name, column in values.items()}, "lr": lr}


def _measurements(block: Block) -> dict[str, Tensor]:
    """The values of the parameters' columns: shape (rows of the block, its parameters)."""
    norms, infs, nans = (
        block.values[:, PARAM_COLUMNS.index(name)] for name in ("grad_norm", "infs", "nans")
    )
    bad = ((infs > 0) | (nans > 0)).double()
    return {
        "param_max": norms.masked_fill(~norms.isfinite(), -math.inf),
        "param_bad": bad.masked_fill(infs.isnan(), -math.inf),
    }
