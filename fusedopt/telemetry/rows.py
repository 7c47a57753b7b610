"""Telemetry of the last steps by name: a copy of the rings on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fusedopt.reference import Control, Group
from fusedopt.telemetry.rings import PARAM_COLUMNS, STEP_COLUMNS, Rings


@dataclass(frozen=True)
class ParamTelemetry:
    """One parameter in the last steps: float64 tensors of shape (steps,), oldest first.

    All are nan for a step without a gradient.

    Attributes:
        numel: how many elements the parameter has.
        grad_norm: the L2 norm of its gradient, unscaled, before clipping.
        grad_max: the largest magnitude in the gradient; inf or nan if it holds one.
        infs, nans: how many of the gradient's elements were inf and nan.
        update_norm: the L2 norm of the parameter's change; 0 for a skipped step.
        param_norm: the L2 norm of the parameter before the step; nan for a skipped step.
        clipped: whether its gradient counts in the global norm and is clipped, as its group says
            now.
    """

    numel: int
    grad_norm: Tensor
    grad_max: Tensor
    infs: Tensor
    nans: Tensor
    update_norm: Tensor
    param_norm: Tensor
    clipped: bool = field(default=True, kw_only=True)

    @property
    def update_ratio(self) -> Tensor:
        """`update_norm / param_norm`: the size of the change relative to the parameter."""
        return torch.where(self.update_norm == 0, 0.0, self.update_norm / self.param_norm)


@dataclass(frozen=True)
class Telemetry:
    """The last steps of an optimizer, oldest first, on the CPU.

    Attributes:
        step: the number of the step, counted from 1 or from a loaded checkpoint's number; int64,
            shape (steps,).
        grad_norm: the global norm, unscaled, before clipping; float64, shape (steps,).
        clip_coef: the factor by which clipping multiplied the gradients; the smallest one if
            parameters or rows have their own; float64, shape (steps,).
        skipped: whether the step changed nothing; bool, shape (steps,).
        lr: the learning rates of the param groups; float64, shape (steps, groups).
        params: the parameters by name, in the order of the groups.
    """

    step: Tensor
    grad_norm: Tensor
    clip_coef: Tensor
    skipped: Tensor
    lr: Tensor
    params: Mapping[str, ParamTelemetry]

    def columns(self) -> dict[str, Tensor]:
        """All columns by name, tensors of shape (steps,). `pandas.DataFrame` takes the result.

        Columns of parameters have names such as "grad_norm/layers.0.weight".
        """
        columns = {name: getattr(self, name) for name in ("step", *STEP_COLUMNS)}
        columns |= {f"lr/{group}": lr for group, lr in enumerate(self.lr.unbind(1))}
        for name, param in self.params.items():
            for column in (*PARAM_COLUMNS, "update_ratio"):
                columns[f"{column}/{name}"] = getattr(param, column)
        return columns


class PendingTelemetry:
    """A copy that is on its way from the device.

    `before`: the number of steps that a checkpoint has brought. The rings don't have these.
    """

    def __init__(
        self, rings: Rings, control: Tensor, param_groups: list[Group], before: int = 0
    ) -> None:
        self._before = before
        self._params = rings.numbered_params(param_groups)
        self._copies = [_copy_to_host(tensor) for tensor in (control, *rings.tensors())]
        self._events = []
        for device in {tensor.device for tensor in (control, *rings.tensors())}:
            if device.type == "cuda":
                self._events.append(torch.cuda.current_stream(device).record_event())

    def done(self) -> bool:
        """Whether `result` would not wait."""
        return all(event.query() for event in self._events)

    def result(self) -> Telemetry:
        """The telemetry. Waits until it has arrived."""
        for event in self._events:
            event.synchronize()
        control, steps, *params = self._copies
        count, size = int(control[Control.STEPS]), steps.shape[0]
        numbers = torch.arange(max(self._before, count - size), count)
        rows = numbers % size
        steps, params = steps[rows], [ring[rows] for ring in params]
        return Telemetry(
            numbers + 1,
            steps[:, 0],
            steps[:, 1],
            steps[:, 2] == 1,
            steps[:, len(STEP_COLUMNS) :],
            {
                name: ParamTelemetry(numel, *params[ring][:, column].unbind(1), clipped=clipped)
                for name, numel, clipped, ring, column in self._params
            },
        )


def _copy_to_host(tensor: Tensor) -> Tensor:
    if tensor.device.type == "cpu":
        return tensor.clone()
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)
