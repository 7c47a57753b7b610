"""A run of any length in bounded memory: intervals of steps, with what stood out in each."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fusedopt.monitoring.telemetry_rows import not_replaced, param_matrix, select
from fusedopt.telemetry import Telemetry

INTERVALS = 1024  # at most; when they are full, neighbors become one

# How values meet in an interval: what it starts from, and how another one is added.
REDUCTIONS = {
    "max": (-math.inf, torch.maximum),
    "min": (math.inf, torch.minimum),
    "sum": (0.0, torch.add),
}
COLUMNS = {
    "norm_max": "max",
    "norm_min": "min",
    "coef_min": "min",
    "lr": "max",
    "steps": "sum",
    "clipped": "sum",
    "skipped": "sum",
    "nonfinite": "sum",
    "param_max": "max",
    "param_bad": "max",
}


class History:
    """Intervals of `width` steps each, from step `first` on.

    `history["norm_max"]` is a float64 tensor with a value for each interval up to that of the last
    step; nan where there was nothing to see.

    * norm_max, norm_min: the largest and smallest finite global norm.
    * coef_min: the smallest clip coefficient.
    * lr: the largest learning rates; shape (intervals, groups).
    * steps, clipped, skipped, nonfinite: how many steps there were, and how many of them were
      clipped, skipped, and updated the parameters with inf or nan.
    * param_max: the largest finite gradient norm of every parameter; shape (intervals, parameters),
      in the order of `names`.
    * param_bad: 1 where such a gradient held inf or nan, 0 where it did not.
    """

    def __init__(self, most_intervals: int = INTERVALS) -> None:
        assert most_intervals % 2 == 0
        self._most = most_intervals
        self.names: list[str] = []
        self._restart(0)

    def _restart(self, first: int) -> None:
        self.first, self.last, self.width = first, first - 1, 1
        self._columns = {
            name: torch.full(self._shape(name, 0), REDUCTIONS[kind][0], dtype=torch.float64)
            for name, kind in COLUMNS.items()
        }

    def _shape(self, column: str, groups: int) -> tuple[int, ...]:
        width = {"lr": groups, "param_max": len(self.names), "param_bad": len(self.names)}
        return (self._most, width[column]) if column in width else (self._most,)

    def __len__(self) -> int:
        return (self.last - self.first) // self.width + 1

    def __getitem__(self, column: str) -> Tensor:
        values = self._columns[column][: len(self)]
        fill, _ = REDUCTIONS[COLUMNS[column]]
        return values.clone() if fill == 0 else values.masked_fill(values == fill, torch.nan)

    def starts(self) -> Tensor:
        """The first step of every interval: int64."""
        return self.first + self.width * torch.arange(len(self))

    def add(self, rows: Telemetry) -> None:
        """Rows behind those that are known, or in their place: a run resumed from before its end.

        Of an interval that is only partly replaced, what stood out before stays.
        """
        kept = not_replaced(rows.step)
        if not kept.all():
            rows = select(rows, kept)
        if len(rows.step) == 0:
            return
        first = int(rows.step[0])
        if self.last < self.first or first <= self.first:
            self._restart(first)
        elif first <= self.last:
            self._cut(first)
        self.last = int(rows.step[-1])
        while len(self) > self._most:
            self._merge_neighbors()
        self._reduce((rows.step - self.first) // self.width, self._values(rows))

    def _values(self, rows: Telemetry) -> dict[str, Tensor]:
        finite = rows.grad_norm.isfinite()
        clipped = (rows.clip_coef < 1) & ~rows.skipped
        params = dict(zip(rows.params, range(len(rows.params))))
        self.names = list(dict.fromkeys((*self.names, *params)))
        norms, infs, nans = param_matrix(rows, ("grad_norm", "infs", "nans")).unbind(1)
        bad = torch.where(infs.isnan(), -math.inf, ((infs > 0) | (nans > 0)).double())
        places = dict(zip(self.names, range(len(self.names))))
        where = [places[name] for name in params]
        param_max = torch.full((len(rows.step), len(self.names)), -math.inf, dtype=torch.float64)
        param_bad = param_max.clone()
        param_max[:, where] = norms.masked_fill(~norms.isfinite(), -math.inf)
        param_bad[:, where] = bad
        return {
            "norm_max": rows.grad_norm.masked_fill(~finite, -math.inf),
            "norm_min": rows.grad_norm.masked_fill(~finite, math.inf),
            "coef_min": rows.clip_coef.nan_to_num(math.inf).masked_fill(rows.skipped, math.inf),
            "lr": rows.lr.nan_to_num(-math.inf),
            "steps": torch.ones_like(rows.grad_norm),
            "clipped": clipped.double(),
            "skipped": rows.skipped.double(),
            "nonfinite": (~finite & ~rows.skipped).double(),
            "param_max": param_max,
            "param_bad": param_bad,
        }

    def _reduce(self, places: Tensor, values: dict[str, Tensor]) -> None:
        """Adds values to the intervals at these places, which only grow."""
        place, lengths = places.unique_consecutive(return_counts=True)
        for name, new in values.items():
            kind, column = COLUMNS[name], self._columns[name]
            start, combine = REDUCTIONS[kind]
            new = torch.segment_reduce(new, kind, lengths=lengths, axis=0, initial=start)
            if new.dim() == 2:  # there may be more parameters or groups than before, or less
                missing = new.shape[1] - column.shape[1]
                column = torch.nn.functional.pad(column, (0, max(0, missing)), value=start)
                new = torch.nn.functional.pad(new, (0, max(0, -missing)), value=start)
            column[place] = combine(column[place], new)
            self._columns[name] = column

    def _cut(self, first: int) -> None:
        """Forgets the steps from there on, as far as they have intervals of their own."""
        start = -(-(first - self.first) // self.width)
        for name, column in self._columns.items():
            column[start:] = REDUCTIONS[COLUMNS[name]][0]

    def _merge_neighbors(self) -> None:
        for name, column in self._columns.items():
            start, combine = REDUCTIONS[COLUMNS[name]]
            merged = combine(column[0::2], column[1::2])
            self._columns[name] = torch.cat([merged, torch.full_like(merged, start)])
        self.width *= 2
