"""A parameter's state: made at its first gradient, or moved into place after loading."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fusedopt.core.backends import zeros_like
from fusedopt.core.forms import in_asked_form, new_states
from fusedopt.core.state_keys import asked_keys
from fusedopt.reference import Group, Rule, all_state_names, distinct_params
from fusedopt.reference.formats import convert_rest, formats_of
from fusedopt.reference.rule import REST

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


def names_of(rule: Rule, group: Group, param: Tensor) -> tuple[str, ...]:
    """The names of all that a parameter's state has."""
    rest = (REST,) if formats_of(group).has_rest(param) else ()
    return (*rule.scalars, *asked_keys(rule, group), *rest)


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
    formats = formats_of(group)
    # Random bits need the count of a parameter that has no other state.
    counted = param in counters and formats.rounds_param(param) and not rule.states(group)
    if rule.hidden_step:
        known = 0 if new and not counted else counters.get(param, 1)
        counters[param] = _scalar_in_place(known, param)
    if new:
        first = {**rule.scalars, **{name: group[key] for name, key in rule.first_values.items()}}
        new_state = {
            **{name: _scalar_in_place(first[name], param) for name in rule.scalars},
            **new_states(rule, group, param),
            **({REST: _new_rest(group, param)} if formats.has_rest(param) else {}),
        }
        # In a dict, as the kernels read only dicts. Users' items stay.
        if not isinstance(state, dict) and (new_state or state is not None):
            states[param] = dict(state or {})
        if new_state:
            states[param].update(new_state)
        return not counted
    assert state is not None
    for name in rule.scalars:
        state[name] = _scalar_in_place(state[name], param)
    _change_form(rule, group, param, state)
    if not formats.in_blocks:
        for name in rule.states(group):
            state[name] = _tensor_in_place(state[name], param, formats.asked_dtype)
    if not formats.has_rest(param):
        state.pop(REST, None)
    elif state.get(REST) is None:
        state[REST] = _new_rest(group, param)
    else:
        state[REST] = rest_in_place(state[REST], group, param)
    return False


def _change_form(rule: Rule, group: Group, param: Tensor, state: dict[str, Any]) -> None:
    """Converts states from or to 8 bits, if the group asks for it, or the parameter has moved."""
    changed = in_asked_form(rule, group, param, state)
    for key in [key for key in state if key not in changed]:
        del state[key]
    state.update(changed)


def _new_rest(group: Group, param: Tensor) -> Tensor:
    return zeros_like(param, formats_of(group).rest_dtype())


def rest_in_place(rest: Tensor, group: Group, param: Tensor) -> Tensor:
    """The rest of a parameter's master, with the bits that its group asks for."""
    rest = convert_rest(rest, formats_of(group).rest_dtype())
    return _tensor_in_place(rest, param, None)


def with_counts(
    rule: Rule, param_groups: list[Group], states: States, counters: dict[Tensor, Tensor]
) -> States:
    """The states as a checkpoint has them: with the counts that random bits need.

    torch's SGD keeps no count. Ours is saved as "step" where weights are rounded at random.
    """
    if not rule.hidden_step:
        return states
    counts = {
        param: counters[param]
        for group, param in distinct_params(param_groups)
        if param in counters and formats_of(group).rounds_param(param)
    }
    return {**states, **{p: {**states.get(p, {}), "step": it} for p, it in counts.items()}}


def take_counts(rule: Rule, param_groups: list[Group], states: States) -> dict[Tensor, Tensor]:
    """Takes out of loaded states what `with_counts` has put into them."""
    if not rule.hidden_step:
        return {}
    return {
        param: _scalar_in_place(states[param].pop("step"), param)
        for group, param in distinct_params(param_groups)
        if param in states and "step" in states[param] and formats_of(group).rounds_param(param)
    }


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


def _tensor_in_place(value: Tensor, param: Tensor, dtype: torch.dtype | None) -> Tensor:
    """On the parameter's device and laid out like it; without a dtype it keeps its own."""
    if is_in_place(value, param) and dtype in (None, value.dtype):
        return value
    return tensor_like(param, value, dtype or value.dtype)


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
