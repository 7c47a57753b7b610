"""An optimizer's checkpoint in the form of torch's own classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedopt.core.forms import in_asked_form
from fusedopt.core.limit_state import KEY
from fusedopt.core.optimizer import FusedOptimizer, check_optimizer
from fusedopt.reference import Group, Rule
from fusedopt.reference.arithmetic import compute_dtype
from fusedopt.reference.formats import FORMAT_OPTIONS
from fusedopt.reference.rule import REST

_OURS = {*FORMAT_OPTIONS, KEY}  # of a param group


@torch.no_grad()
def to_torch(optimizer: FusedOptimizer) -> dict[str, Any]:
    """The `state_dict()` as the twin in torch.optim takes it. Nothing of the optimizer changes.

    States are copies in float32, or in float64 for float64 parameters: 8 bits are decoded. The rest
    of a master is left out: load `master_weights(optimizer)` into a float32 model to go on with the
    masters. So are options and statistics that torch doesn't have.

    Args:
        optimizer: any of fusedopt's.

    Raises:
        TypeError: the optimizer is another library's.
    """
    check_optimizer("to_torch", optimizer)
    saved = optimizer.state_dict()
    states = dict(saved["state"])
    for group, listed in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        for param, key in zip(group["params"], listed["params"], strict=True):
            if key in saved["state"]:
                states[key] = _state(optimizer.rule, group, param, saved["state"][key])
    return {"state": states, "param_groups": [*map(_group, saved["param_groups"])]}


def _group(group: Group) -> Group:
    return {key: value for key, value in group.items() if key not in _OURS}


def _state(rule: Rule, group: Group, param: Tensor, state: dict[str, Any]) -> dict[str, Any]:
    result = in_asked_form(rule, {**group, "state_dtype": None}, param, state)
    result.pop(REST, None)
    if rule.hidden_step:
        result.pop("step", None)
    for name in rule.states(group):
        if name in result:
            result[name] = result[name].to(compute_dtype(param.dtype), copy=True)
    return result
