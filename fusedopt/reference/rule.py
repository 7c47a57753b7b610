"""What a rule is to the reference: an optimizer's formula in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedopt.reference.groups import Group


@dataclass(frozen=True)
class Twin:
    """torch's own function of a rule, for parameters of one group.

    `step(group, params, grads, states, fused)` updates parameters and states in place; a state has
    the rule's counter too. `fused_dtypes`: parameters of these dtypes take torch's fused kernels,
    all others its foreach functions. `suits(group)`: whether the function keeps what our classes
    promise with these options.
    """

    step: Callable[[Group, list[Tensor], list[Tensor], list[dict[str, Tensor]], bool], None]
    fused_dtypes: tuple[torch.dtype, ...] = ()
    suits: Callable[[Group], bool] = lambda group: True


def column(states: list[dict[str, Tensor]], name: str) -> list[Tensor]:
    """One state of several parameters, as torch's functions take it."""
    return [state[name] for state in states]


@dataclass(frozen=True)
class Rule:
    """An optimizer's formula, and what it keeps for every parameter.

    `scalars` are its 0-d float32 states with the values that they start from, `states(group)` the
    names of those shaped as the parameter. `update(group, scalars, param, grad, states)` returns
    the new parameter and the new states; all tensors come and go in the type that is computed in.
    `advance(group, scalars)` returns the scalars of this step, which `update` is given.

    `counter` names the scalar that counts a state's steps. Where torch's twin doesn't keep one, it
    is not among `scalars` and is kept apart from the state; of a loaded state it starts from 1.

    `twin` updates parameters where nothing is compiled.
    """

    name: str
    scalars: dict[str, float]
    states: Callable[[Group], tuple[str, ...]]
    advance: Callable[[Group, dict[str, Tensor]], dict[str, Tensor]]
    update: Callable[
        [Group, dict[str, Tensor], Tensor, Tensor, dict[str, Tensor]],
        tuple[Tensor, dict[str, Tensor]],
    ]
    counter: str = "step"
    twin: Twin | None = None

    @property
    def hidden_step(self) -> bool:
        return self.counter not in self.scalars


def count_step(group: Group, scalars: dict[str, Tensor]) -> dict[str, Tensor]:
    """`advance` of a rule whose only scalar is the number of its steps."""
    return {"step": scalars["step"] + 1}
