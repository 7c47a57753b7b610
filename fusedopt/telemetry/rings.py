"""Rings of rows on the devices, which steps write telemetry to."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedopt.reference import Group, distinct_params, is_clipped
from fusedopt.reference.groups import named_params

# The columns that the kernels write for every step (the groups' learning rates follow), and for
# every parameter.
STEP_COLUMNS = ("grad_norm", "clip_coef", "skipped")
PARAM_COLUMNS = ("grad_norm", "grad_max", "infs", "nans", "update_norm", "param_norm")


class Rings:
    """Rows of the last `size` steps, float64; the row of step t, counted from 1, is (t - 1) % size.

    Attributes:
        size: how many steps are kept.
        steps: shape (size, 3 + groups), on the first parameter's device; see `STEP_COLUMNS`.
        params: by device, shape (size, its parameters, 6); see `PARAM_COLUMNS`.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.steps = torch.empty((size, 0), dtype=torch.float64)
        self.params: dict[torch.device, Tensor] = {}
        self._owners: dict[torch.device, list[Tensor]] = {}

    def resize(self, param_groups: list[Group]) -> None:
        """Makes room for these parameters. Known measurements stay; unknown ones are nan."""
        owners: dict[torch.device, list[Tensor]] = {}
        for _, param in distinct_params(param_groups):
            if param.device.type == "meta":  # it is left alone, and that device can hold no ring
                continue
            owners.setdefault(param.device, []).append(param)
        columns = len(STEP_COLUMNS) + len(param_groups)
        if _ids(owners) == _ids(self._owners) and self.steps.shape[1] == columns:
            return
        known = {
            id(param): self.params[device][:, i]
            for device, params in self._owners.items()
            for i, param in enumerate(params)
        }
        rings = {}
        for device, params in owners.items():
            ring = self._unknown((self.size, len(params), len(PARAM_COLUMNS)), device)
            for i, param in enumerate(params):
                if id(param) in known:
                    ring[:, i] = known[id(param)]
            rings[device] = ring
        steps = self._unknown((self.size, columns), next(iter(owners), torch.device("cpu")))
        shared = min(columns, self.steps.shape[1])
        steps[:, :shared] = self.steps[:, :shared]
        self.steps, self.params, self._owners = steps, rings, owners

    @staticmethod
    def _unknown(shape: tuple[int, ...], device: torch.device) -> Tensor:
        return torch.full(shape, torch.nan, dtype=torch.float64, device=device)

    def numbered_params(self, param_groups: list[Group]) -> list[tuple[str, int, bool, int, int]]:
        """For every parameter: its name, elements, whether it is clipped, and its place.

        The place is a ring (an index into `params`) and a column.
        """
        unclipped = {id(p) for group, p in distinct_params(param_groups) if not is_clipped(group)}
        where = {
            id(param): (ring, column)
            for ring, params in enumerate(self._owners.values())
            for column, param in enumerate(params)
        }
        return [
            (name, _numel(param), id(param) not in unclipped, *where[id(param)])
            for param, name in named_params(param_groups)
            if id(param) in where
        ]

    def tensors(self) -> list[Tensor]:
        """All rings: the ring of the steps, then the devices' rings in the order of `params`."""
        return [self.steps, *self.params.values()]


def _numel(param: Tensor) -> int:
    return 0 if torch.nn.parameter.is_lazy(param) else param.numel()


def _ids(owners: dict[torch.device, list[Tensor]]) -> list[tuple[torch.device, list[int]]]:
    return [(device, [id(param) for param in params]) for device, params in owners.items()]
