"""A parameter's state: made at its first gradient, or moved into place after loading."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fusedopt.core.backends import zeros_like
from fusedopt.reference import Group, Rule, all_state_names

States = dict[Tensor, dict[str, Any]]


def is_empty(state: dict[str, Any] | None) -> bool:
    """Whether a state is empty. torch's SGD writes None for a missing buffer."""
    if not isinstance(state, dict):
        return not state
    return all(value is None for value in state.values())


def is_new(state: object) -> bool:
    """Whether a state holds no state of a rule. It may hold a user's items.

    An object that is neither None nor a mapping is not new: `check_state` refuses it.
    """
    if state is None:
        return True
    return isinstance(state, Mapping) and all(state.get(name) is None for name in all_state_names())


def complete(
    rule: Rule, group: Group, param: Tensor, states: States, counters: dict[Tensor, Tensor]
) -> bool:
    """Makes sure that a parameter with a gradient has a state that a step can use.

    Returns:
        Whether the state is new.
    """
    return param.grad is not None and make_complete(rule, group, param, states, counters)


def make_complete(
    rule: Rule, group: Group, param: Tensor, states: States, counters: dict[Tensor, Tensor]
) -> bool:
    """As `complete`, whether the parameter has a gradient or not."""
    state = states.get(param)
    new = is_new(state)
    if rule.hidden_step:
        known = 0 if new else counters.get(param, 1)
        counters[param] = _scalar_in_place(known, param)
    if new:
        new_state = {
            **{name: _scalar_in_place(value, param) for name, value in rule.scalars.items()},
            **{name: zeros_like(param) for name in rule.states(group)},
        }
        if new_state:  # in a dict, as the kernels read only dicts; users' items stay
            if not isinstance(state, dict):
                states[param] = dict(state or {})
            states[param].update(new_state)
        return True
    assert state is not None
    for name in rule.scalars:
        state[name] = _scalar_in_place(state[name], param)
    for name in rule.states(group):
        state[name] = _tensor_in_place(state[name], param)
    return False


def _scalar_in_place(value: Any, param: Tensor) -> Tensor:
    """The value as 0-d float32 on the parameter's device. torch also keeps it elsewhere."""
    if is_scalar_in_place(value, param):
        return value
    return scalar_like(param, value)


def is_scalar_in_place(value: Any, param: Tensor) -> bool:
    return (
        isinstance(value, Tensor)
        and value.dim() == 0
        and not value.is_neg()
        and value.dtype == torch.float32
        and value.device == param.device
    )


def _tensor_in_place(value: Tensor, param: Tensor) -> Tensor:
    """The value on the parameter's device and with its layout. The dtype stays."""
    return value if is_in_place(value, param) else tensor_like(param, value, value.dtype)


def is_in_place(value: Tensor, param: Tensor) -> bool:
    """Whether a tensor of a parameter's shape has its device and layout."""
    like = torch.empty_like(param, dtype=value.dtype, device="meta")
    return value.device == param.device and value.stride() == like.stride() and not value.is_neg()


def scalar_like(param: Tensor, value: Any) -> Tensor:
    """A copy of one number as a rule's scalar: 0-d float32 on the parameter's device."""
    if isinstance(value, Tensor):
        return value.to(param.device, torch.float32).reshape(()).clone()
    # It is filled on the device: copying a number there would wait.
    return torch.full((), float(value), dtype=torch.float32, device=param.device)


def tensor_like(param: Tensor, value: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of a tensor on a parameter's device and with its layout."""
    return zeros_like(param, dtype).copy_(value.resolve_neg())
