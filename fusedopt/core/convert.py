"""An optimizer's checkpoint in the form of torch's own classes, bitsandbytes' or torchao's."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusedopt.core.forms import in_asked_form
from fusedopt.core.limit_state import KEY
from fusedopt.core.optimizer import FusedOptimizer, check_optimizer
from fusedopt.core.peer_states import BITSANDBYTES, BITSANDBYTES_BLOCK
from fusedopt.reference import Group, Rule
from fusedopt.reference.arithmetic import compute_dtype
from fusedopt.reference.formats import FORMAT_OPTIONS, formats_of
from fusedopt.reference.rule import REST

_OURS = {*FORMAT_OPTIONS, KEY}  # of a param group
_SMALLEST_CODED = 4096  # elements; smaller tensors have no 8 bits in bitsandbytes and torchao
_TORCHAO_BLOCK = 256


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


@torch.no_grad()
def to_bitsandbytes(optimizer: FusedOptimizer) -> dict[str, Any]:
    """The `state_dict()` as bitsandbytes' class takes it. Nothing of the optimizer changes.

    A parameter of 4096 elements or more whose group has `state_dtype="8bit"` gets states of
    bitsandbytes' 8 bits, rounded to nearest by its own functions, for `AdamW8bit`. All others get
    states in float32, which its classes of 32 and of 8 bits go on with. Masters are left out:
    `master_weights` has them.

    Args:
        optimizer: a FusedAdam, FusedAdamW, FusedAdEMAMix or FusedLion.

    Raises:
        ImportError: bitsandbytes is needed for its 8 bits, and is missing.
        TypeError: the optimizer is of another class.
        ValueError: bitsandbytes' class doesn't have an option that is in use.
    """
    converted = _to_peer("to_bitsandbytes", optimizer, ("adam", "ademamix", "lion"))
    for group, listed in zip(optimizer.param_groups, converted["param_groups"], strict=True):
        for param, key in zip(group["params"], listed["params"], strict=True):
            if key in converted["state"]:
                in_blocks = formats_of(group).in_blocks and param.numel() >= _SMALLEST_CODED
                state = converted["state"][key]
                converted["state"][key] = _bitsandbytes(optimizer.rule, state, in_blocks)
    groups = converted["param_groups"]
    ours = {"betas", "eps", "weight_decay", "alpha"}
    converted["param_groups"] = [
        {
            "lr": float(it["lr"]),
            "eps": 0.0,
            "alpha": 0.0,
            "t_alpha": it.get("alpha_warmup") or None,
            "t_beta3": it.get("beta3_warmup") or None,
            **{key: it[key] for key in ours & it.keys()},
            "params": it["params"],
        }
        for it in groups
    ]
    return converted


@torch.no_grad()
def to_torchao(optimizer: FusedOptimizer) -> dict[str, Any]:
    """The `state_dict()` as torchao's Adam8bit or AdamW8bit takes it. Nothing of ours changes.

    A state of 4096 elements or more, in whole blocks of 256, is rounded to nearest by torchao's own
    functions. All others are in float32; torch's loader gives them the parameter's dtype. Masters
    are left out: `master_weights` has them.

    Args:
        optimizer: a FusedAdam or FusedAdamW.

    Raises:
        ImportError: torchao is missing.
        TypeError: the optimizer is of another class.
        ValueError: torchao's class doesn't have an option that is in use.
    """
    converted = _to_peer("to_torchao", optimizer, ("adam",))
    states = importlib.import_module("torchao.optim.subclass_8bit").OptimState8bit
    for state in converted["state"].values():
        for key in state.keys() - {"step"}:
            value = state[key]
            if value.numel() >= _SMALLEST_CODED and value.numel() % _TORCHAO_BLOCK == 0:
                coded = states.zeros(
                    value.shape, key == "exp_avg", _TORCHAO_BLOCK, value.device, value.dtype
                )
                state[key] = coded.copy_(value.contiguous())
    theirs = ("betas", "eps", "weight_decay", "amsgrad", "params")
    converted["param_groups"] = [
        {"lr": torch.tensor(float(it["lr"])), **{key: it[key] for key in theirs}}
        for it in converted["param_groups"]
    ]
    return converted


def _to_peer(function: str, optimizer: FusedOptimizer, rules: tuple[str, ...]) -> dict[str, Any]:
    """As `to_torch`, of an optimizer whose formula the other library has."""
    check_optimizer(function, optimizer)
    if optimizer.rule.name not in rules:
        raise TypeError(
            f"{function} was given a {type(optimizer).__name__} of the rule {optimizer.rule.name}; "
            f"expected an optimizer of the rules {', '.join(rules)}"
        )
    for index, group in enumerate(optimizer.param_groups):
        decays = group["weight_decay"] != 0 and not group.get("decoupled_weight_decay", True)
        in_use = {
            "maximize=True": group["maximize"],
            "amsgrad=True": group.get("amsgrad"),
            "a decay that is added to the gradient": function == "to_bitsandbytes" and decays,
        }
        for option in (option for option, used in in_use.items() if used):
            raise ValueError(
                f"param group {index} has {option}, which the class that {function} converts for "
                "doesn't have; expected a group without it"
            )
    return to_torch(optimizer)


def _bitsandbytes(rule: Rule, state: dict[str, Any], in_blocks: bool) -> dict[str, Any]:
    result: dict[str, Any] = {"step": int(state.get("step", 1))}
    for key, names in BITSANDBYTES[rule.name].items():
        parts = [state[name].contiguous() for name in names]
        first = parts[0]
        if not in_blocks:
            result[key] = torch.stack(parts) if len(parts) > 1 else first
            continue
        functional = importlib.import_module("bitsandbytes.functional")
        is_signed = rule.codings[names[0]] == "linear"
        qmap = functional.create_dynamic_map(signed=is_signed).to(first.device)
        coded = [_coded(functional.quantize_blockwise, part, qmap) for part in parts]
        codes, scales = (torch.stack(its) for its in zip(*coded, strict=True))
        if len(parts) == 1:
            codes, scales = codes[0], scales[0]
        result |= {key: codes, "qmap" + key[-1]: qmap, "absmax" + key[-1]: scales}
    return result


def _coded(quantize: Callable[..., Any], values: Tensor, qmap: Tensor) -> tuple[Tensor, Tensor]:
    codes, quantized = quantize(values, code=qmap, blocksize=BITSANDBYTES_BLOCK)
    return codes, quantized.absmax


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
