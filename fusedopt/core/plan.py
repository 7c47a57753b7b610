"""The interface of a plan. The compiled kernels have one, and so does `fallback`."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from fusedopt.reference import Group, message

# (index of the param group, index in the group, name of the state; "" for the parameter itself)
TensorPlace = tuple[int, int, str]


class Plan(Protocol):
    """Parameters, states and options that are looked up once, and compared at every step."""

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
        exchange: message.Exchange | None = ...,
    ) -> bool:
        """Takes one whole step. Returns False, and changes nothing, if this plan no longer fits.

        `exchange` adds up messages over ranks.
        """
        ...

    def shared_memory(self) -> tuple[TensorPlace, TensorPlace] | None:
        """Two tensors that share memory and that a step would both write, or None."""
        ...

    def nonfinite(self) -> list[tuple[int, int]]:
        """(group, index in the group) of the parameters whose gradients hold inf or nan."""
        ...
