"""Loading a state_dict, torch's or ours: all of it is checked and copied before anything changes.

It differs from torch's own loading in three ways. State keeps its dtype where a step can use it,
instead of being rounded to its parameter's 16 bits. It is copied, never shared with the checkpoint.
And how a step is implemented (`IMPLEMENTATION`) is not for a checkpoint to say.
"""

from __future__ import annotations

import math
from collections import defaultdict
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from fusedopt.core import checks
from fusedopt.core.checks import IMPLEMENTATION
from fusedopt.core.state import is_empty, scalar_like, tensor_like
from fusedopt.reference import Group, Rule
from fusedopt.reference.arithmetic import compute_dtype
from fusedopt.reference.groups import name_of
from fusedopt.reference.limits import AdaptiveClip


def load_groups(groups: list[Group], state_dict: Any) -> list[Group]:
    """The options of a checkpoint, with the parameters of `groups`."""
    _check_form(groups, state_dict)
    return [_load_group(*pair) for pair in zip(groups, state_dict["param_groups"])]


def _check_form(groups: list[Group], state_dict: Any) -> None:
    """Refuses what has another form than a checkpoint of these groups."""
    if not isinstance(state_dict, dict) or not state_dict.keys() >= {"state", "param_groups"}:
        found = list(state_dict) if isinstance(state_dict, dict) else type(state_dict).__name__
        raise ValueError(f"loaded state dict is {found}; expected 'state' and 'param_groups'")
    if not isinstance(state_dict["state"], dict):
        found = type(state_dict["state"]).__name__
        raise TypeError(f"loaded state dict has a {found} as 'state'; expected a dict")
    saved_groups = state_dict["param_groups"]
    if not isinstance(saved_groups, list | tuple):
        found = type(saved_groups).__name__
        raise TypeError(f"loaded state dict has a {found} as 'param_groups'; expected a list")
    if len(saved_groups) != len(groups):
        raise ValueError(
            "loaded state dict has a different number of parameter groups: "
            f"{len(saved_groups)}; expected {len(groups)}"
        )
    for index, (group, saved) in enumerate(zip(groups, saved_groups)):
        if not isinstance(saved, dict) or not isinstance(saved.get("params"), list | tuple):
            raise TypeError(
                f"loaded param group {index} has no list of 'params'; expected the ids of "
                f"{len(group['params'])} parameters"
            )
        for key in ("params", "param_names"):
            if key in saved and len(saved[key]) != len(group["params"]):
                raise ValueError(
                    "loaded state dict contains a parameter group that doesn't match the size of "
                    f"optimizer's group: param group {index} has {len(saved[key])} in its "
                    f"{key!r}; expected {len(group['params'])}"
                )


def _load_group(group: Group, saved: Group) -> Group:
    options = {key: value for key, value in saved.items() if key not in ("params", *IMPLEMENTATION)}
    loaded = {"params": group["params"], **deepcopy(options)}
    loaded |= {key: group[key] for key in IMPLEMENTATION if key in group}
    if "param_names" in group:
        loaded.setdefault("param_names", group["param_names"])
    return loaded


@torch.inference_mode(False)
@torch.no_grad()
def load_state(rule: Rule, groups: list[Group], state_dict: dict[str, Any]) -> dict[Any, Any]:
    """A checkpoint's state by parameter. `groups` are what `load_groups` has made of its groups."""
    # A checkpoint's ids stand for the parameters that are listed at the same places.
    listed: dict[Any, tuple[Group, Tensor, str]] = {}
    for index, (group, saved_group) in enumerate(zip(groups, state_dict["param_groups"])):
        for position, (param, key) in enumerate(zip(group["params"], saved_group["params"])):
            name = name_of(groups, index, position)
            if key in listed and listed[key][1] is not param:
                raise ValueError(
                    f"loaded state dict has the id {key!r} for both {listed[key][2]} and {name}"
                )
            listed[key] = group, param, name
    states: dict[Any, Any] = defaultdict(dict)
    for key, saved in state_dict["state"].items():
        if key in listed:
            group, param, name = listed[key]
            if not isinstance(saved, dict):
                raise TypeError(f"the state of {name} is a {type(saved).__name__}; expected a dict")
            if not is_empty(saved):
                states[param] = _load_param_state(rule, group, param, saved, name)
        elif isinstance(key, int):
            raise ValueError(
                f"loaded state dict has a state for id {key}, which is in none of its param groups"
            )
        else:  # a user's own
            states[key] = deepcopy(saved)
    return states


def _load_param_state(
    rule: Rule, group: Group, param: Tensor, saved: dict[str, Any], name: str
) -> dict[str, Any]:
    lazy = torch.nn.parameter.is_lazy(param)  # no shape yet: the first step looks at its state
    own = () if lazy else (*rule.scalars, *rule.states(group))
    if own:
        checks.check_state(rule, group, param, saved, name)
        _check_values(rule, group, saved, name)
    dtypes = {saved[key].dtype for key in own if key not in rule.scalars}
    computed = compute_dtype(param.dtype)
    usable = len(dtypes) == 1 and dtypes <= {param.dtype, computed}
    loaded = {}
    for key, value in saved.items():  # in its order
        if key not in own:
            loaded[key] = _copied(value, param.device)
        elif key in rule.scalars:
            loaded[key] = scalar_like(param, value)
        else:
            loaded[key] = tensor_like(param, value, value.dtype if usable else computed)
    return loaded


def _check_values(rule: Rule, group: Group, state: dict[str, Any], name: str) -> None:
    """Refuses values that no step has left: as all is copied anyway, they may be looked at."""
    for key in rule.scalars:
        value = float(state[key])
        whole = key != "step" or (math.isfinite(value) and value == int(value))
        if not (math.isfinite(value) and value >= 0 and whole):
            expected = "a whole number >= 0" if key == "step" else "a finite number >= 0"
            raise ValueError(f"state {key!r} of {name} is {value}; expected {expected}")
    for key in rule.states(group):
        if state[key].dtype not in checks.DTYPES:
            raise TypeError(
                f"state {key!r} of {name} is {state[key].dtype}; expected {checks.DTYPE_NAMES}"
            )


def save_clip(clip: AdaptiveClip, state: Tensor) -> dict[str, Any]:
    """What an adaptive limit has learned, for a checkpoint. torch's classes look past it."""
    return {"limit": clip.label(), "state": state}


@torch.inference_mode(False)
def load_clip(
    limit: object, param_groups: list[Group], state_dict: dict[str, Any]
) -> Tensor | None:
    """What this very limit has learned; None where the checkpoint doesn't know it."""
    saved = state_dict.get("clip")
    if saved is None or not isinstance(limit, AdaptiveClip):
        return None
    if not isinstance(saved, dict) or not saved.keys() >= {"limit", "state"}:
        raise ValueError(f"loaded state dict has {saved!r} as 'clip'; expected 'limit' and 'state'")
    if saved["limit"] != limit.label():
        return None
    num_params = sum(len(group["params"]) for group in param_groups)
    state, expected = saved["state"], limit.new_state(num_params, torch.device("cpu"))
    if (
        not isinstance(state, Tensor)
        or state.shape != expected.shape
        or state.dtype != expected.dtype
    ):
        raise ValueError(
            f"loaded state dict has {state!r} as the state of {limit}; expected a float64 tensor "
            f"of shape {tuple(expected.shape)}"
        )
    counts = state[..., :1]  # by which kernels find the place of a norm in a window
    if state.isnan().any() or not ((counts >= 0) & (counts <= 2**53) & (counts % 1 == 0)).all():
        raise ValueError(
            f"loaded state dict has {state!r} as the state of {limit}; expected whole numbers of "
            "steps, and no nan"
        )
    return state.detach().clone(memory_format=torch.contiguous_format)


def _copied(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True)
    if isinstance(value, dict):
        return {key: _copied(item, device) for key, item in value.items()}
    if isinstance(value, list):
        return [_copied(item, device) for item in value]
    return deepcopy(value)
