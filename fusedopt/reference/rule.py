"""A rule of the reference: an optimizer's formula in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedopt.reference.groups import Group


@dataclass(frozen=True)
class Twin:
    """torch's own functions for a rule. They update the parameters of one group.

    Attributes:
        step: `step(group, params, grads, states, fused)` updates parameters and states in place. A
            state also has the rule's counter.
        fused_dtypes: parameters of these dtypes take torch's fused kernels; all others take its
            foreach functions.
        suits: `suits(group)` says whether these functions keep the promises of our classes with
            the group's options.
    """

    step: Callable[[Group, list[Tensor], list[Tensor], list[dict[str, Tensor]], bool], None]
    fused_dtypes: tuple[torch.dtype, ...] = ()
    suits: Callable[[Group], bool] = lambda group: True


def column(states: list[dict[str, Tensor]], name: str) -> list[Tensor]:
    """One state of several parameters, as torch's functions take it."""
    return [state[name] for state in states]


@dataclass(frozen=True)
class Rule:
    """An optimizer's formula, and the states that it keeps for every parameter.

    Attributes:
        name: the rule's name in csrc/rules.
        scalars: the names of the 0-d float32 states, with their first values.
        states: `states(group)` returns the names of the states shaped as the parameter.
        advance: `advance(group, scalars)` returns the scalars of this step, for `update`.
        update: `update(group, scalars, param, grad, states)` returns the new parameter and the new
            states. All tensors have the dtype that the parameter is computed in.
        counter: the name of the scalar that counts steps. If torch's class keeps no such state, it
            is not among `scalars`, and it is kept apart from the state. It starts from 1 when a
            state is loaded.
        twin: torch's functions, which update parameters where nothing is compiled.
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


def with_l2(group: Group, param: Tensor, grad: Tensor) -> Tensor:
    """The gradient of the loss with an L2 penalty: `weight_decay` times the parameter is added."""
    weight_decay = float(group["weight_decay"])
    return grad if weight_decay == 0 else grad + weight_decay * param
