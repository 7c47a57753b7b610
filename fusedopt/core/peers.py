"""Recognizes checkpoints of other libraries, and gives them the form of torch's.

A library is told by the keys of a parameter's state or of its param group. What a group of that
library doesn't have, or has under another meaning, stays as this optimizer has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusedopt.core.peer_states import (
    BITSANDBYTES,
    MASTER,
    State,
    from_bitsandbytes,
    from_flashoptim,
    from_torchao,
    is_bitsandbytes,
    is_flashoptims,
    is_torchaos,
)
from fusedopt.distributed import is_dtensor
from fusedopt.reference import Group, Rule
from fusedopt.reference.formats import HALF_DTYPES, formats_of, rest_beside
from fusedopt.reference.groups import name_of
from fusedopt.reference.rule import REST

if TYPE_CHECKING:
    from fusedopt.core.checkpoint import Checkpoint

_FP16_KEYS = {"optimizer_state_dict", "fp32_groups"}  # of apex.contrib's FP16_Optimizer
_CARRIED = ("initial_lr",)  # what torch's schedulers keep in a group
_NOT_LOADED = ("params", "param_names")


def unwrapped(state_dict: Any) -> Any:
    """The state_dict within one of apex.contrib's FP16_Optimizer, with its masters."""
    if not isinstance(state_dict, Mapping) or not state_dict.keys() >= _FP16_KEYS:
        return state_dict
    inner, masters = state_dict["optimizer_state_dict"], state_dict["fp32_groups"]
    state = dict(inner["state"])
    for group, of_group in zip(inner["param_groups"], masters, strict=True):
        for key, master in zip(group["params"], of_group, strict=True):
            if key in state:
                state[key] = {**state[key], MASTER: master}
    return {**inner, "state": state}


def translated(rule: Rule, groups: list[Group], checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint of another library as torch would have written it; any other one as it is.

    Raises:
        TypeError, ValueError, RuntimeError: it has options or states that ours can't go on with.
    """
    states, translated_groups = dict(checkpoint.state), []
    for index, (group, saved) in enumerate(zip(groups, checkpoint.groups, strict=True)):
        found = {key: states[key] for key in saved["params"] if _is_mapping(states.get(key))}
        library = _library_of(saved, found)
        translated_groups.append(saved if library is None else _group(rule, library, group, saved))
        if library is None:
            continue
        _check_group(rule, library, group, saved, index)
        for place, (param, key) in enumerate(zip(group["params"], saved["params"], strict=True)):
            if key in found:
                name = name_of(groups, index, place)
                values = _values(rule, library, saved, param, dict(found[key]), name)
                states[key] = _with_rest(group, param, values, name)
    return replace(checkpoint, state=states, groups=translated_groups)


def _is_mapping(state: Any) -> bool:
    return isinstance(state, Mapping)


def _library_of(group: Group, states: Mapping[Any, State]) -> str | None:
    each = states.values()
    if any(map(is_bitsandbytes, each)):
        return "bitsandbytes"
    if any(map(is_torchaos, each)):
        return "torchao"
    if "master_bytewidth" in group or any(map(is_flashoptims, each)):
        return "FlashOptim"
    # Our LAMB has this option, too, but apex counts the steps of a group in the group.
    is_apexs = "bias_correction" in group and not any("step" in state for state in each)
    if is_apexs or any(MASTER in state for state in each):
        return "apex or TransformerEngine"
    return None


def _check_group(rule: Rule, library: str, own: Group, saved: Group, index: int) -> None:
    if library == "bitsandbytes" and rule.name not in BITSANDBYTES:
        raise TypeError(
            f"loaded param group {index} is of bitsandbytes, whose states fit the rules "
            f"{', '.join(BITSANDBYTES)}; expected one of torch's or of ours for {rule.name}"
        )
    if not saved.get("bias_correction", True) and "bias_correction" not in own:
        raise ValueError(
            f"loaded param group {index} has bias_correction=False; expected True: no step here "
            "leaves the correction out"
        )


def _group(rule: Rule, library: str, own: Group, saved: Group) -> Group:
    """The group with the options of `saved` that ours has too, and its other options from `own`."""
    options = {key: value for key, value in own.items() if key not in _NOT_LOADED}
    theirs = _renamed(rule, saved) if library == "bitsandbytes" else saved
    for key in theirs.keys() & {*options, *_CARRIED}:
        value = theirs[key]
        if isinstance(value, Tensor) and not isinstance(options.get(key), Tensor):
            value = float(value)  # torchao's lr
        options[key] = value
    return {**options, **{key: saved[key] for key in _NOT_LOADED if key in saved}}


def _renamed(rule: Rule, saved: Group) -> Group:
    """bitsandbytes keeps the options of all of its classes under the names of Adam's."""
    first = tuple(saved.get("betas", ()))[:1]
    if rule.name == "ademamix":
        return {
            **saved,
            "alpha_warmup": saved.get("t_alpha") or 0,
            "beta3_warmup": saved.get("t_beta3") or 0,
        }
    renamed = {"sgd": "momentum", "rmsprop": "alpha"}.get(rule.name)
    return {**saved, renamed: float(first[0])} if renamed and first else saved


def _values(
    rule: Rule, library: str, saved: Group, param: Tensor, state: State, name: str
) -> State:
    """A parameter's state by our names, without the rest of its master."""
    if library == "bitsandbytes":
        state = from_bitsandbytes(rule.name, state, name)
    elif library == "torchao":
        state = from_torchao(state, name)
    elif library == "FlashOptim":
        state = from_flashoptim(state, param, int(saved.get("master_bytewidth") or 3), name)
    if "step" in rule.scalars and (count := state.get("step", saved.get("step"))) is not None:
        state["step"] = torch.as_tensor(float(count))
    elif rule.hidden_step:
        state.pop("step", None)
    return state


def _with_rest(group: Group, param: Tensor, state: State, name: str) -> State:
    """The state with the rest of a master, if the group keeps one, in the place of the master."""
    master = state.pop(MASTER, None)
    if master is None or not formats_of(group).has_rest(param):
        return state
    what = f"the master of {name}"
    if not isinstance(master, Tensor) or is_dtensor(master) or is_dtensor(param):
        raise TypeError(f"{what} is a {type(master).__name__}; expected a plain tensor")
    if master.shape != param.shape:
        raise RuntimeError(
            f"{what} has shape {tuple(master.shape)}; expected the parameter's {tuple(param.shape)}"
        )
    if master.dtype == torch.int16 and param.dtype == torch.bfloat16:
        return {**state, REST: master}
    if master.dtype != torch.float32:
        raise TypeError(f"{what} is {master.dtype}; expected torch.float32")
    assert param.dtype in HALF_DTYPES
    rest, are_near = rest_beside(master.to(param.device), param)
    if not are_near.all():
        raise ValueError(
            f"{what} differs by more than half a unit of the last bit from "
            f"{int((~are_near).sum())} of its {param.numel()} elements; expected the parameter's "
            "own: load the model's weights before the optimizer's state"
        )
    return {**state, REST: rest}
