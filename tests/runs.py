"""Telemetry of made-up runs, for the tests of `plot` and `watch`."""

from __future__ import annotations

import math

import torch
from log_rows import make_rows, rows_of

from fusedopt import Telemetry
from fusedopt.monitoring.history import History
from fusedopt.monitoring.telemetry_rows import select

SKIPPED, HUGE, FIRST_WITH_BIAS = 30, 45, 11
NAMES = ["rnn.weight", "rnn.bias", "out.weight"]


def run_of(steps: int, names: list[str] = NAMES, groups: int = 1) -> Telemetry:
    """Norms around 1. Step 30 is skipped for an inf in the first parameter, step 45 is huge."""
    generator = torch.Generator().manual_seed(0)
    step = torch.arange(1, steps + 1)
    params = torch.zeros(steps, 6, len(names), dtype=torch.float64)
    params[:, 0] = torch.rand(steps, len(names), generator=generator) + 0.5
    params[:, 4], params[:, 5] = 0.02, 2.0
    norm = params[:, 0].square().sum(1).sqrt()
    norm[step == HUGE] = 1e6
    params[step == HUGE, 0, -1] = 1e6
    coef = (4.0 / norm).clamp(max=1.0)
    skipped = step == SKIPPED
    norm[skipped], coef[skipped] = math.inf, 0.0
    params[skipped, 0, 0], params[skipped, 2, 0] = math.inf, 3
    params[skipped, 4], params[skipped, 5] = 0.0, math.nan
    if len(names) > 1:
        params[: FIRST_WITH_BIAS - 1, :, 1] = math.nan
    lr = (0.1 / step)[:, None].double().expand(-1, groups)
    readings = torch.stack([norm, coef, skipped.double()], 1)
    return make_rows(step, readings, lr, dict.fromkeys(names, 10), params).telemetry()


def history_of(rows: Telemetry, batch: int = 1000, intervals: int = 64) -> History:
    history = History(intervals)
    for start in range(0, len(rows.step), batch):
        history.add(rows_of(select(rows, slice(start, start + batch))))
    return history
