"""Selects rows of telemetry, and puts the measurements of all parameters in one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fusedopt.telemetry import PARAM_COLUMNS, Telemetry


def param_matrix(rows: Telemetry, columns: Sequence[str] = PARAM_COLUMNS) -> Tensor:
    """The parameters' measurements: float64, shape (steps, columns, parameters)."""
    shape = (len(rows.step), len(columns), len(rows.params))
    params = list(rows.params.values())
    values = [getattr(param, column) for column in columns for param in params]
    return torch.stack(values, 1).view(shape) if values else torch.empty(shape, dtype=torch.float64)


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
