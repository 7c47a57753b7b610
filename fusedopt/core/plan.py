"""What a step needs of a plan. The compiled kernels have one, and so has `fallback`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from fusedopt.reference import Group

# (index of the param group, index in the group, name of the state; "" for the parameter itself)
TensorPlace = tuple[int, int, str]


class Plan(Protocol):
    """What was looked up once, and is compared at every step: parameters, states and options."""

    def step(
        self,
        param_groups: list[Group],
        state: dict[Tensor, dict[str, Tensor]],
        max_grad_norm: float,
        measure: bool,
        skip_nonfinite: bool,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        clip: Any,
        control: Tensor,
        exchange: Callable[[list[Tensor]], float] = ...,
    ) -> bool:
        """One whole step, or False: then this plan doesn't fit, and nothing has been changed.

        `exchange` adds up over ranks: from the sums of chunks, by device, to the sum of squares.
        """
        ...

    def shared_memory(self) -> tuple[TensorPlace, TensorPlace] | None:
        """Two tensors that share memory, where a step would write both at once; None: no two do."""
        ...

    def nonfinite(self) -> list[tuple[int, int]]:
        """(group, index in the group) of the parameters whose gradients hold inf or nan."""
        ...
