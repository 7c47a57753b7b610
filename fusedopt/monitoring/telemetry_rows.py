"""Rows of telemetry: some of them, several batches of them, and all parameters in one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fusedopt.telemetry import PARAM_COLUMNS, ParamTelemetry, Telemetry


def param_matrix(rows: Telemetry, columns: Sequence[str] = PARAM_COLUMNS) -> Tensor:
    """What is known of the parameters: float64, shape (steps, columns, parameters)."""
    shape = (len(rows.step), len(columns), len(rows.params))
    values = [getattr(param, column) for column in columns for param in rows.params.values()]
    return torch.stack(values, 1).view(shape) if values else torch.empty(shape, dtype=torch.float64)


def from_matrix(
    step: Tensor, readings: Tensor, lr: Tensor, sizes: dict[str, int], params: Tensor
) -> Telemetry:
    """The telemetry of tensors of shapes (steps,), (steps, 3), (steps, groups), and as above."""
    by_name = {
        name: ParamTelemetry(numel, *params[:, :, i].unbind(1))
        for i, (name, numel) in enumerate(sizes.items())
    }
    return Telemetry(step, readings[:, 0], readings[:, 1], readings[:, 2] == 1, lr, by_name)


def select(rows: Telemetry, which: Tensor | slice) -> Telemetry:
    """Some of the rows: a mask, indices or a slice."""
    params = {
        name: replace(param, **{column: getattr(param, column)[which] for column in PARAM_COLUMNS})
        for name, param in rows.params.items()
    }
    return Telemetry(
        rows.step[which],
        rows.grad_norm[which],
        rows.clip_coef[which],
        rows.skipped[which],
        rows.lr[which],
        params,
    )


def concatenate(batches: Sequence[Telemetry]) -> Telemetry:
    """One after the other. A parameter or param group that a batch lacks is nan in its rows.

    Where step numbers go back, the run was resumed from before its end: the later rows count.
    """
    sizes: dict[str, int] = {}
    for batch in batches:
        for name, param in batch.params.items():
            sizes[name] = param.numel or sizes.get(name, 0)
    place = {name: i for i, name in enumerate(sizes)}
    groups = max((batch.lr.shape[1] for batch in batches), default=0)
    total = sum(len(batch.step) for batch in batches)
    params = torch.full((total, len(PARAM_COLUMNS), len(sizes)), torch.nan, dtype=torch.float64)
    lr = torch.full((total, groups), torch.nan, dtype=torch.float64)
    start = 0
    for batch in batches:
        end = start + len(batch.step)
        params[start:end, :, [place[name] for name in batch.params]] = param_matrix(batch)
        lr[start:end, : batch.lr.shape[1]] = batch.lr
        start = end
    none = [torch.empty(0)]
    step = torch.cat([b.step for b in batches] or [torch.empty(0, dtype=torch.int64)])
    readings = torch.stack(
        [
            torch.cat([getattr(b, name).double() for b in batches] or none)
            for name in ("grad_norm", "clip_coef", "skipped")
        ],
        1,
    ).double()
    whole = from_matrix(step, readings, lr, sizes, params)
    return select(whole, not_replaced(step))


def not_replaced(step: Tensor) -> Tensor:
    """Which rows no later row of the same or an earlier step replaces: bool, shape (steps,)."""
    if len(step) == 0:
        return torch.empty(0, dtype=torch.bool)
    earliest_from_here = step.flip(0).cummin(0).values.flip(0)
    later = torch.cat([earliest_from_here[1:], step.new_tensor([2**63 - 1])])
    return step < later
