"""A state of a parameter has one of two forms: a tensor of its name, or codes of 8 bits and scales.

A group's `state_dtype` tells the form. A state that has the other one, from a checkpoint or from
before the group's option was changed, is converted by way of float32 values, rounded to nearest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fusedopt.core.backends import zeros_like
from fusedopt.core.state_keys import found_keys, scale_keys
from fusedopt.distributed import is_dtensor, like, local_of
from fusedopt.reference import Group, Rule
from fusedopt.reference.blocks import CODE_DTYPES, decode, encode, keys_of, num_blocks
from fusedopt.reference.formats import formats_of


def new_states(rule: Rule, group: Group, param: Tensor) -> dict[str, Tensor]:
    """States of their first values, which are zeros without `rule.first_values`."""
    formats = formats_of(group)
    if not formats.in_blocks:
        dtype = formats.dtype_of_state(param)
        first = {name: group[key] for name, key in rule.first_values.items()}
        return {name: _filled(param, dtype, first.get(name)) for name in rule.states(group)}
    result = {}
    for name in rule.states(group):
        codes, scales = keys_of(name)
        result[codes] = zeros_like(param, CODE_DTYPES[rule.codings[name]])
        result[scales] = _scales_like(param, torch.zeros(_blocks_here(param), device=param.device))
    return result


def _blocks_here(param: Tensor) -> int:
    return num_blocks(local_of(param).numel())


def _scales_like(param: Tensor, scales: Tensor) -> Tensor:
    """This rank's scales as a parameter's state has them: of a DTensor, they are one."""
    return like(param, scales, (num_blocks(param.numel()),))


def _filled(param: Tensor, dtype: torch.dtype, value: Any) -> Tensor:
    """A tensor like the parameter, of one number; None: of zeros."""
    zeros = zeros_like(param, dtype)
    if value is None:
        return zeros
    return zeros.copy_(value.reshape(())) if isinstance(value, Tensor) else zeros.fill_(value)


def in_asked_form(
    rule: Rule, group: Group, param: Tensor, state: Mapping[str, Any]
) -> dict[str, Any]:
    """A state that has been checked, with its states in the form that its group asks for.

    Codes are laid out as the parameter, on its device.
    """
    if not is_dtensor(param):
        return _in_asked_form(rule, group, param, state)
    here = {key: local_of(value) for key, value in state.items()}
    result: dict[str, Any] = {}
    for key, value in _in_asked_form(rule, group, local_of(param), here).items():
        wraps = _scales_like if key in scale_keys(rule) else like
        is_as_it_was = key in here and value is here[key]
        result[key] = state[key] if is_as_it_was else wraps(param, value)
    return result


def _in_asked_form(
    rule: Rule, group: Group, param: Tensor, state: Mapping[str, Any]
) -> dict[str, Any]:
    """As `in_asked_form`, of plain tensors."""
    result = dict(state)
    for name in rule.codings:
        if name not in rule.states(group):
            continue
        found = found_keys(rule, group, name, state)
        for key in {name, *keys_of(name)}.difference(found):
            result.pop(key, None)
        if not formats_of(group).in_blocks:
            if found != (name,):
                del result[found[0]], result[found[1]]
                result[name] = _values(rule, name, state, found)
        elif not _is_in_place(param, state, found):
            result.pop(name, None)
            values = zeros_like(param, torch.float32).copy_(_values(rule, name, state, found))
            result.update(zip(keys_of(name), encode(rule.codings[name], values), strict=True))
    return result


def _values(rule: Rule, name: str, state: Mapping[str, Any], found: tuple[str, ...]) -> Tensor:
    if found == (name,):
        return state[name]
    return decode(rule.codings[name], *(state[key] for key in found))


def _is_in_place(param: Tensor, state: Mapping[str, Any], found: tuple[str, ...]) -> bool:
    """Whether a state has codes and scales that a step can use."""
    if len(found) != 2:
        return False
    codes, scales = (state[key] for key in found)
    like = torch.empty_like(param, dtype=codes.dtype, device="meta")
    same_device = codes.device == scales.device == param.device
    return same_device and codes.stride() == like.stride() and scales.is_contiguous()
