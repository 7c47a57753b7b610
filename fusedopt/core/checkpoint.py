"""Saves and loads a state_dict, torch's or ours. Everything is checked before anything changes.

Loading differs from torch's in four ways. A state keeps its dtype if a step can use it; torch
rounds it to its parameter's dtype. A tensor of the checkpoint is copied if writing to it would be
wrong (see `takeover`). Names count before places (see `arrange`). The flags of `IMPLEMENTATION` and
the settings of `FORMAT_OPTIONS` and `GROUP_SETTINGS` are not loaded.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusedopt.core import checks, limit_state, takeover
from fusedopt.core.arrange import arranged, loaded_names
from fusedopt.core.check_formats import check_shards
from fusedopt.core.checks import IMPLEMENTATION
from fusedopt.core.forms import in_asked_form
from fusedopt.core.names import Names
from fusedopt.core.state import (
    is_empty,
    is_in_place,
    is_new,
    is_scalar_in_place,
    names_of,
    scalar_like,
    tensor_like,
)
from fusedopt.core.state_keys import found_keys, scale_keys
from fusedopt.distributed import check_placements, local_of
from fusedopt.reference import Group, Rule
from fusedopt.reference.arithmetic import compute_dtype
from fusedopt.reference.formats import FORMAT_OPTIONS, convert_rest, formats_of
from fusedopt.reference.groups import GROUP_SETTINGS, name_of
from fusedopt.reference.rule import REST

MAX_COUNT = 2**24  # a float32 can't count further
SHARE = "share"  # the key of a state_dict that has the states of one rank's share only


@dataclass(frozen=True)
class Checkpoint:
    """A state_dict of the right form.

    Attributes:
        state: the states by id.
        groups: the groups with their ids and names, in the order of the optimizer.
        listed: all ids in the order of the checkpoint.
        limit: the saved state of an adaptive limit, or None.
    """

    state: dict[Any, Any]
    groups: list[Group]
    listed: list[Any]
    limit: Any


def save(param_groups: list[Group], state: dict[Any, Any]) -> dict:
    """The same as torch's `state_dict`, but without states of tensors that are in no group."""
    ids: dict[int, int] = {}
    groups, count = [], 0
    for group in param_groups:
        for place, param in enumerate(group["params"], count):
            ids.setdefault(id(param), place)
        count += len(group["params"])
        listed = [ids[id(param)] for param in group["params"]]
        options = {key: it for key, it in group.items() if key not in ("params", limit_state.KEY)}
        groups.append({**options, "params": listed})
    saved = {
        ids[id(key)] if isinstance(key, Tensor) else key: value
        for key, value in state.items()
        if not isinstance(key, Tensor) or id(key) in ids
    }
    return {"state": saved, "param_groups": groups}


def read(state_dict: Any, names: Names) -> Checkpoint:
    """Reads a state_dict for parameters with these names. Refuses one that does not fit."""
    if not isinstance(state_dict, Mapping) or not state_dict.keys() >= {"state", "param_groups"}:
        found = list(state_dict) if isinstance(state_dict, Mapping) else _type_of(state_dict)
        raise ValueError(f"loaded state dict is {found}; expected 'state' and 'param_groups'")
    state, saved_groups = state_dict["state"], state_dict["param_groups"]
    if not isinstance(state, Mapping):
        raise TypeError(f"loaded state dict has a {_type_of(state)} as 'state'; expected a dict")
    if not _is_list(saved_groups):
        found = _type_of(saved_groups)
        raise TypeError(f"loaded state dict has a {found} as 'param_groups'; expected a list")
    if len(saved_groups) != len(names):
        raise ValueError(
            "loaded state dict has a different number of parameter groups: "
            f"{len(saved_groups)}; expected {len(names)}"
        )
    for index, saved in enumerate(saved_groups):
        if not isinstance(saved, Mapping) or not _is_list(saved.get("params")):
            raise TypeError(
                f"loaded param group {index} has no list of 'params'; expected the ids of "
                f"{len(names[index])} parameters"
            )
        if not _is_list(saved.get("param_names", ())):
            found = _type_of(saved["param_names"])
            raise TypeError(
                f"loaded param group {index} has a {found} as 'param_names'; expected a list"
            )
    groups = [dict(saved) for saved in saved_groups]
    limits = [group.pop(limit_state.KEY, None) for group in groups]
    limits.append(state_dict.get("clip"))  # version 0.1 has it there
    return Checkpoint(
        dict(state.items()),
        arranged(names, groups),
        [key for group in groups for key in group["params"]],
        next((limit for limit in limits if limit is not None), None),
    )


def check_share(state_dict: Mapping[str, Any], share: dict[str, Any] | None) -> None:
    """Refuses a checkpoint that lacks the states of another rank's share."""
    saved = state_dict.get(SHARE)
    if saved is None or saved == share:
        return
    told = f"rank {saved['rank']} of {saved['ranks']}" if isinstance(saved, Mapping) else saved
    raise ValueError(
        f"loaded state dict is the share of {told}, and lacks the states of other parameters; "
        "expected that of this rank of so many. What fits any number of ranks is saved with "
        "fusedopt.consolidated_state_dict or with torch.distributed.checkpoint"
    )


def load_groups(groups: list[Group], names: Names, checkpoint: Checkpoint) -> list[Group]:
    """The param groups after loading: the saved options, with `groups`' parameters and names."""
    loaded = [_load_group(*pair) for pair in zip(groups, checkpoint.groups, strict=True)]
    for group, param_names in zip(loaded, loaded_names(names, checkpoint.groups) or ()):
        group["param_names"] = param_names
    return loaded


def _load_group(group: Group, saved: Group) -> Group:
    kept = (*IMPLEMENTATION, *FORMAT_OPTIONS, *GROUP_SETTINGS)
    not_loaded = ("params", "param_names", *kept)
    options = {key: value for key, value in saved.items() if key not in not_loaded}
    own = {key: group[key] for key in kept if key in group}
    params = group["params"]
    params = params if isinstance(params, list | tuple) else list(params)  # a view has no copy
    return {"params": params, **deepcopy(options), **own}


@dataclass(frozen=True)
class _Entry:
    """A parameter's state in a checkpoint, checked."""

    group: Group
    param: Tensor
    saved: dict[Any, Any]
    own: tuple[str, ...]  # the rule's items; all others are a user's


@torch.inference_mode(False)
@torch.no_grad()
def load_state(
    rule: Rule, groups: list[Group], checkpoint: Checkpoint, keeps: Callable[[Tensor], bool]
) -> dict[Any, Any]:
    """The states of a checkpoint by parameter. All are checked, and those of others are left out.

    Args:
        groups: the result of `load_groups`.
        keeps: whether this rank has a parameter's state.
    """
    entries, users = _entries(rule, groups, checkpoint)
    entries = [it for it in entries if keeps(it.param)]
    shared = takeover.to_take_over(
        [value for it in entries for value in _own_tensors(it)], _params_and_grads(groups)
    )
    states: dict[Any, Any] = defaultdict(dict)
    states.update((it.param, _load_param_state(rule, it, shared)) for it in entries)
    states.update(users)
    return states


def params_by_id(groups: list[Group], checkpoint: Checkpoint) -> dict[Any, tuple[int, int]]:
    """For each id, the group that lists its parameter, and the index in the group."""
    found: dict[Any, tuple[int, int]] = {}
    params = [list(group["params"]) for group in groups]
    for g, saved in enumerate(checkpoint.groups):
        for i, key in enumerate(saved["params"]):
            first, other = found.setdefault(key, (g, i))
            if params[first][other] is not params[g][i]:
                raise ValueError(
                    f"loaded state dict has the id {key!r} for both "
                    f"{name_of(groups, first, other)} and {name_of(groups, g, i)}"
                )
    return found


def largest_step(rule: Rule, states: Iterable[Any]) -> int | None:
    """The largest number of steps of a parameter. None if this rule's state has no such number."""
    if rule.hidden_step:
        return None
    return max((_whole(state.get(rule.counter)) for state in states), default=0)


def _whole(count: Any) -> int:
    """The value as a number of steps; 0 if it is no such number."""
    if not isinstance(count, int | float | Tensor) or (
        isinstance(count, Tensor) and (count.numel() != 1 or count.device.type == "meta")
    ):
        return 0
    number = float(count)
    return int(min(max(number, 0), MAX_COUNT)) if math.isfinite(number) else 0


def _entries(
    rule: Rule, groups: list[Group], checkpoint: Checkpoint
) -> tuple[list[_Entry], dict[Any, Any]]:
    """The checked states of the parameters, and all other items, which are a user's."""
    places = params_by_id(groups, checkpoint)
    entries, users = [], {}
    for key, saved in checkpoint.state.items():
        if key in places:
            group, index = places[key]
            name = name_of(groups, group, index)
            if not isinstance(saved, Mapping):
                raise TypeError(f"the state of {name} is a {_type_of(saved)}; expected a dict")
            saved = dict(saved.items())
            if not is_empty(saved):
                param = list(groups[group]["params"])[index]
                entries.append(_checked(rule, groups[group], param, saved, name))
        elif isinstance(key, int):
            raise ValueError(
                f"loaded state dict has a state for id {key}, which is in none of its param groups"
            )
        else:
            users[key] = saved  # unchanged, as torch does
    return entries, users


def _checked(rule: Rule, group: Group, param: Tensor, saved: dict[Any, Any], name: str) -> _Entry:
    # Without a shape or data yet: the first step looks at its state.
    waits = torch.nn.parameter.is_lazy(param) or checks.is_left_alone(local_of(param))
    own = () if waits or is_new(saved) else names_of(rule, group, local_of(param))
    own = tuple(key for key in own if key != REST or saved.get(REST) is not None)
    if REST not in own and not waits:
        saved.pop(REST, None)  # of a master that this optimizer doesn't keep
    if own:
        found = [key for it in rule.states(group) for key in found_keys(rule, group, it, saved)]
        found += [REST] if REST in own else []
        check_placements(found, param, saved, name)
        check_shards(group, param, name)
        local = {key: local_of(value) for key, value in saved.items()}
        checks.check_state(rule, group, local_of(param), local, name)
        _check_values(rule, group, local, name)
        saved = in_asked_form(rule, group, param, saved)
    return _Entry(group, param, saved, own)


def _check_values(rule: Rule, group: Group, state: dict[str, Any], name: str) -> None:
    """Refuses values that no step leaves behind."""
    for key in rule.scalars:
        value = float(state[key])
        whole = key != "step" or (math.isfinite(value) and value == int(value))
        if not (math.isfinite(value) and value >= 0 and whole):
            expected = "a whole number >= 0" if key == "step" else "a finite number >= 0"
            raise ValueError(f"state {key!r} of {name} is {value}; expected {expected}")
    for key in rule.states(group):
        if key in state and state[key].dtype not in checks.DTYPES:
            raise TypeError(
                f"state {key!r} of {name} is {state[key].dtype}; expected {checks.DTYPE_NAMES}"
            )


def _own_tensors(entry: _Entry) -> list[Tensor]:
    own = (local_of(entry.saved[key]) for key in entry.own)
    return [value for value in own if isinstance(value, Tensor)]


def _params_and_grads(groups: list[Group]) -> Iterator[Tensor]:
    for group in groups:
        for param in group["params"]:
            if isinstance(param, Tensor):
                yield local_of(param)
                if param.grad is not None:
                    yield local_of(param.grad)


def _load_param_state(rule: Rule, entry: _Entry, shared: Container[int]) -> dict[str, Any]:
    """`shared`: the ids of this rank's tensors that need no copy."""
    param = entry.param
    tensors = [key for key in entry.own if key in rule.states(entry.group)]
    dtypes = {entry.saved[key].dtype for key in tensors}
    computed = compute_dtype(param.dtype)
    formats = formats_of(entry.group)
    usable = len(dtypes) == 1 and dtypes <= {param.dtype, computed}
    loaded = {}
    for key, value in entry.saved.items():  # in the saved order
        if key not in entry.own:
            nowhere = torch.nn.parameter.is_lazy(param) or param.is_meta
            loaded[key] = deepcopy(value) if nowhere else _moved(value, param.device)
        elif key in rule.scalars:
            taken = id(value) in shared and is_scalar_in_place(value, param)
            loaded[key] = value if taken else scalar_like(param, value)
        elif key in scale_keys(rule):
            taken = id(value) in shared
            loaded[key] = value if taken else value.to(param.device, copy=True)
        elif formats.in_blocks and key != REST:
            taken = id(value) in shared
            loaded[key] = value if taken else tensor_like(param, value, value.dtype)
        else:
            dtype = formats.asked_dtype or (value.dtype if usable else computed)
            if key == REST:
                dtype = formats.rest_dtype()
                value = convert_rest(value, dtype)
            taken = id(local_of(value)) in shared and value.dtype == dtype
            taken = taken and is_in_place(local_of(value), local_of(param))
            loaded[key] = value if taken else tensor_like(param, value, dtype)
    return loaded


def _moved(value: Any, device: torch.device) -> Any:
    """A user's item in a parameter's state, with its tensors on the parameter's device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _moved(item, device) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_moved(item, device) for item in value)
    return value


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _type_of(value: Any) -> str:
    return type(value).__name__
