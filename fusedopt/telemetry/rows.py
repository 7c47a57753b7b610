"""What the last steps were like, by name: a copy of the rings on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedopt.reference import Control, Group
from fusedopt.telemetry.rings import PARAM_COLUMNS, STEP_COLUMNS, Rings


@dataclass(frozen=True)
class ParamTelemetry:
    """One parameter in the last steps: float64 tensors of shape (steps,), oldest first.

    All are nan for a step that found no gradient.

    Attributes:
        numel: how many elements the parameter has.
        grad_norm: the L2 norm of its gradient, unscaled, before clipping.
        grad_max: the largest magnitude in it: inf or nan where there is one.
        infs, nans: how many of its elements were inf and nan.
        update_norm: the L2 norm of what the step added to the parameter; 0 where it was skipped.
        param_norm: the L2 norm of the parameter before the step; nan where it was skipped.
    """

    numel: int
    grad_norm: Tensor
    grad_max: Tensor
    infs: Tensor
    nans: Tensor
    update_norm: Tensor
    param_norm: Tensor

    @property
    def update_ratio(self) -> Tensor:
        """`update_norm / param_norm`: by how much of its own size the parameter moved."""
        return torch.where(self.update_norm == 0, 0.0, self.update_norm / self.param_norm)


@dataclass(frozen=True)
class Telemetry:
    """The last steps of an optimizer, oldest first, on the CPU.

    Attributes:
        step: which step, counted from 1, or on from those of a loaded checkpoint; int64, shape
            (steps,).
        grad_norm: the global norm, unscaled, before clipping; float64, shape (steps,).
        clip_coef: what clipping multiplied the gradients by: the smallest coefficient, where
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
        """All of it by name, a tensor of shape (steps,) each: `pandas.DataFrame(it)` is a table.

        The parameters' columns are called as in "grad_norm/layers.0.weight".
        """
        columns = {name: getattr(self, name) for name in ("step", *STEP_COLUMNS)}
        columns |= {f"lr/{group}": lr for group, lr in enumerate(self.lr.unbind(1))}
        for name, param in self.params.items():
            for column in (*PARAM_COLUMNS, "update_ratio"):
                columns[f"{column}/{name}"] = getattr(param, column)
        return columns


class PendingTelemetry:
    """A copy that is on its way from the device.

    `before`: the rings have only the steps after so many; a checkpoint has brought the others.
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
        """The telemetry; waits until it is there."""
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
                name: ParamTelemetry(numel, *params[ring][:, column].unbind(1))
                for name, numel, ring, column in self._params
            },
        )


def _copy_to_host(tensor: Tensor) -> Tensor:
    if tensor.device.type == "cpu":
        return tensor.clone()
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)
