"""Rows of a log, made by hand or from an optimizer's telemetry."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedopt import Telemetry
from fusedopt.monitoring.log_rows import Block, Rows
from fusedopt.monitoring.telemetry_rows import param_matrix


def make_rows(
    step: Tensor, readings: Tensor, lr: Tensor, sizes: dict[str, int], params: Tensor
) -> Rows:
    """Rows that all have the same parameters, measured in each of them."""
    return Rows(step, readings, lr, [Block(sizes, torch.arange(len(step)), params)])


def rows_of(telemetry: Telemetry) -> Rows:
    columns = (telemetry.grad_norm, telemetry.clip_coef, telemetry.skipped.double())
    sizes = {name: param.numel for name, param in telemetry.params.items()}
    readings = torch.stack(columns, 1)
    return make_rows(telemetry.step, readings, telemetry.lr, sizes, param_matrix(telemetry))
