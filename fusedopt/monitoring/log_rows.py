"""The rows of a log in few tensors, whose size is in proportion to the file's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fusedopt.telemetry import PARAM_COLUMNS, STEP_COLUMNS, ParamTelemetry, Telemetry


@dataclass(frozen=True)
class Block:
    """The measurements of some parameters in some rows.

    Attributes:
        sizes: the parameters by name, with their numbers of elements (0: not known).
        rows: the rows that have these measurements, ascending: int64, shape (n,).
        values: float64, shape (n, 6, parameters); see `PARAM_COLUMNS`.
    """

    sizes: Mapping[str, int]
    rows: Tensor
    values: Tensor


@dataclass(frozen=True)
class Rows:
    """Steps of a log. If no block of a row has a parameter, the log doesn't know it there.

    Attributes:
        step: the numbers of the steps: int64, shape (steps,).
        readings: float64, shape (steps, 3); see `STEP_COLUMNS`.
        lr: float64, shape (steps, groups); nan where a row has fewer groups.
        blocks: a row is in at most one of them.
    """

    step: Tensor
    readings: Tensor
    lr: Tensor
    blocks: Sequence[Block]

    @property
    def grad_norm(self) -> Tensor:
        return self.readings[:, 0]

    @property
    def clip_coef(self) -> Tensor:
        return self.readings[:, 1]

    @property
    def skipped(self) -> Tensor:
        return self.readings[:, 2] == 1

    def select(self, mask: Tensor) -> Rows:
        """The rows for which the mask (bool, shape (steps,)) is set."""
        if mask.all():
            return self
        places = mask.cumsum(0) - 1
        blocks = []
        for block in self.blocks:
            kept = mask[block.rows]
            blocks.append(Block(block.sizes, places[block.rows[kept]], block.values[kept]))
        return Rows(self.step[mask], self.readings[mask], self.lr[mask], blocks)

    def telemetry(self) -> Telemetry:
        """The same as an optimizer's `telemetry()`."""
        params = ParamColumns(len(self.step), self.blocks)
        return Telemetry(self.step, self.grad_norm, self.clip_coef, self.skipped, self.lr, params)


class ParamColumns(Mapping[str, ParamTelemetry]):
    """The parameters of a log by name. Their columns are made when they are asked for.

    All columns of all parameters at once may take far more memory than the log: those of a
    parameter that was measured in one step have a nan for each of the others.
    """

    def __init__(self, steps: int, blocks: Sequence[Block]) -> None:
        self._steps = steps
        self._sizes: dict[str, int] = {}
        self._places: dict[str, list[tuple[Block, int]]] = {}
        for block in blocks:
            for index, (name, size) in enumerate(block.sizes.items()):
                self._sizes[name] = size or self._sizes.get(name, 0)
                places = self._places.setdefault(name, [])
                if len(block.rows):
                    places.append((block, index))

    def __getitem__(self, name: str) -> ParamTelemetry:
        values = torch.full((self._steps, len(PARAM_COLUMNS)), torch.nan, dtype=torch.float64)
        for block, index in self._places[name]:
            values[block.rows] = block.values[:, :, index]
        return ParamTelemetry(self._sizes[name], *values.unbind(1))

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def join(batches: Sequence[Rows]) -> Rows:
    """The rows of all batches, one batch after the other.

    Where step numbers go back, the run was resumed from before its end: the later rows count.
    """
    step = torch.cat([rows.step for rows in batches] or [torch.empty(0, dtype=torch.int64)])
    readings = torch.empty((len(step), len(STEP_COLUMNS)), dtype=torch.float64)
    groups = max((rows.lr.shape[1] for rows in batches), default=0)
    lr = torch.full((len(step), groups), torch.nan, dtype=torch.float64)
    blocks: list[Block] = []
    start = 0
    for rows in batches:
        end = start + len(rows.step)
        readings[start:end] = rows.readings
        lr[start:end, : rows.lr.shape[1]] = rows.lr
        blocks += [replace(block, rows=block.rows + start) for block in rows.blocks]
        start = end
    return Rows(step, readings, lr, blocks).select(not_replaced(step))


def not_replaced(step: Tensor) -> Tensor:
    """Which rows no later row of the same or an earlier step replaces: bool, shape (steps,)."""
    if len(step) == 0:
        return torch.empty(0, dtype=torch.bool)
    earliest_from_here = step.flip(0).cummin(0).values.flip(0)
    later = torch.cat([earliest_from_here[1:], step.new_tensor([2**63 - 1])])
    return step < later
