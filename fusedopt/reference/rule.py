"""A rule of the reference: an optimizer's formula in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fusedopt.reference.blocks import Coding, keys_of
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


class TrustNorms(NamedTuple):
    """The norms of a parameter and of a rule's term, and how many elements they have."""

    params: float
    terms: float
    numel: int


@dataclass(frozen=True)
class Trust:
    """The trust ratio of a rule: a factor for every parameter, from two norms.

    Attributes:
        term: `term(group, scalars, param, grad, states)` returns a tensor shaped as the parameter,
            whose norm counts, and the new values of `states`. `Rule.update` then gets these, as
            they were stored.
        ratio: `ratio(group, norms)` returns the ratio.
        states: the names of the states that `term` updates. If there are any, `Rule.update` uses no
            gradient.
        reads: the names of the states that `term` gets, too, and doesn't change.
        reads_param: whether `term` or `ratio` needs the parameter. If not, its norm is given as 0.
    """

    term: Callable[
        [Group, dict[str, Tensor], Tensor, Tensor, dict[str, Tensor]],
        tuple[Tensor, dict[str, Tensor]],
    ]
    ratio: Callable[[Group, TrustNorms], float]
    states: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    reads_param: bool = True


def column(states: list[dict[str, Tensor]], name: str) -> list[Tensor]:
    """One state of several parameters, as torch's functions take it."""
    return [state[name] for state in states]


REST = "param_rest"  # in a parameter's state: the bits that its master has beside it

# Of every rule that exists; a dict keeps their order.
_state_names: dict[str, None] = {REST: None}


def all_state_names() -> Collection[str]:
    """The names of what a parameter's state may have, of every rule that has been made so far."""
    return _state_names.keys()


@dataclass(frozen=True)
class Rule:
    """An optimizer's formula, and the states that it keeps for every parameter.

    Attributes:
        name: the rule's name in csrc/rules.
        scalars: the names of the 0-d float32 states, with their first values.
        tensors: the names of the states that are shaped as the parameter.
        optional: those of `tensors` that not every group uses. `optional[name](group)` says
            whether a group with these options does.
        advance: `advance(group, scalars)` returns the scalars of this step, for `update`.
        prepare_next: `prepare_next(group, scalars)` returns the scalars that the next step starts
            from, after `update` has used this step's.
        update: `update(group, scalars, param, grad, states)` returns the new parameter and the new
            states. All tensors have the dtype that the parameter is computed in. A rule with a
            trust ratio gets it as one more argument.
        counter: the name of the scalar that counts steps. If torch's class keeps no such state, it
            is not among `scalars`, and it is kept apart from the state. It starts from 1 when a
            state is loaded.
        codings: how those of `tensors` that can be stored in 8 bits are stored; see
            `fusedopt.reference.blocks`. A group that uses another state can't have 8 bits.
        twin: torch's functions, which update parameters where nothing is compiled.
        first_values: the option of the group that a new state is filled with, by the state's name.
            All others start from 0, or as `scalars` says.
        any_sign: the options that may be negative.
        scratch: the names of arrays like those of `tensors` that `update` returns, too, and that
            are no state: they are for what follows in the same step.
        trust: the trust ratio, if the rule has one.
        counts: the options that hold several numbers, and how many. All others hold one.
    """

    name: str
    scalars: dict[str, float]
    tensors: tuple[str, ...]
    advance: Callable[[Group, dict[str, Tensor]], dict[str, Tensor]]
    update: Callable[..., tuple[Tensor, dict[str, Tensor]]]
    counter: str = "step"
    codings: Mapping[str, Coding] = field(default_factory=dict)
    twin: Twin | None = None
    optional: Mapping[str, Callable[[Group], bool]] = field(default_factory=dict)
    prepare_next: Callable[[Group, dict[str, Tensor]], dict[str, Tensor]] = lambda group, it: it
    first_values: Mapping[str, str] = field(default_factory=dict)
    any_sign: tuple[str, ...] = ()
    scratch: tuple[str, ...] = ()
    trust: Trust | None = None
    counts: Mapping[str, int] = field(default_factory=lambda: {"betas": 2})

    def __post_init__(self) -> None:
        codes = [key for name in self.codings for key in keys_of(name)]
        _state_names.update(dict.fromkeys((*self.scalars, *self.tensors, *codes)))

    def states(self, group: Group) -> tuple[str, ...]:
        """The names of the states shaped as the parameter that a group with these options uses."""
        optional = self.optional
        return tuple(it for it in self.tensors if it not in optional or optional[it](group))

    @property
    def hidden_step(self) -> bool:
        return self.counter not in self.scalars


def count_step(group: Group, scalars: dict[str, Tensor]) -> dict[str, Tensor]:
    """`advance` of a rule whose only scalar is the number of its steps."""
    return {"step": scalars["step"] + 1}


def with_decay(group: Group, param: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The parameter and the gradient after weight decay, which changes one of them."""
    if group.get("decoupled_weight_decay"):
        return param * (1 - group["lr"] * group["weight_decay"]), grad
    return param, with_l2(group, param, grad)


def with_l2(group: Group, param: Tensor, grad: Tensor) -> Tensor:
    """The gradient of the loss with an L2 penalty: `weight_decay` times the parameter is added."""
    weight_decay = float(group["weight_decay"])
    return grad if weight_decay == 0 else grad + weight_decay * param
