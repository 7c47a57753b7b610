"""Refuses formats that no step can store arrays in; warns of 16-bit parameters without masters."""

from __future__ import annotations

import logging
import numbers
from typing import Any

import torch
from torch import Tensor

from fusedopt.core.state_keys import found_keys
from fusedopt.distributed import first_element, is_cut_alike, is_dtensor, local_of
from fusedopt.reference import Group, Rule
from fusedopt.reference.arithmetic import is_subclass
from fusedopt.reference.blocks import BLOCK_SIZE, CODE_DTYPES, keys_of, num_blocks
from fusedopt.reference.formats import HALF_DTYPES, REST_DTYPES, Formats, formats_of
from fusedopt.reference.rule import REST

MASTER_WEIGHTS = ("exact", "24bit")
STATE_DTYPES = (torch.float32, torch.bfloat16, "8bit")
ROUNDINGS = ("nearest", "stochastic")

# Why a state can't have 8 bits.
UNCODED = {
    "max_exp_avg_sq": "random rounding would raise a maximum step by step",
    "exp_inf": "random rounding would raise a maximum step by step",
    "grad_avg": "its square is subtracted from square_avg, and little is left of rounded numbers",
}

log = logging.getLogger("fusedopt")
_has_warned = False


def check_formats(where: str, group: Group) -> None:
    """Refuses values of `FORMAT_OPTIONS` that mean nothing. `where`: "" or "param group 0's "."""
    formats = formats_of(group)
    for name, choices in (
        ("master_weights", MASTER_WEIGHTS),
        ("state_dtype", STATE_DTYPES),
        ("rounding", ROUNDINGS),
    ):
        value = getattr(formats, name)
        if not (value is None or any(type(value) is type(it) and value == it for it in choices)):
            expected = ", ".join(map(repr, choices))
            raise ValueError(
                f"Invalid {where}{name} value: {value!r}; expected one of {expected} or None"
            )
    seed = formats.seed
    if seed is None:
        return
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral):
        raise TypeError(f"{where}seed is a {type(seed).__name__}; expected an int or None")
    if not 0 <= int(seed) < 2**64:
        raise ValueError(
            f"Invalid {where}seed value: {seed}; expected an int >= 0 and < 2**64, or None"
        )


def check_rule_formats(rule: Rule, group: Group, index: int) -> None:
    """Refuses states of 8 bits for a rule, or with options, that they don't suit."""
    if not formats_of(group).in_blocks:
        return
    for state in rule.states(group):
        if state not in rule.codings:
            why = UNCODED.get(state, "its rule has no coding for it")
            raise ValueError(
                f"param group {index} has state_dtype='8bit', and with its options {rule.name} has "
                f"{state!r}, which can't have 8 bits: {why}; expected torch.bfloat16, "
                "torch.float32 or None"
            )


def check_param_formats(group: Group, param: Tensor, name: str) -> None:
    """Refuses a parameter that can't be stored as its group asks for."""
    formats = formats_of(group)
    is_frozen = param.grad is None and not param.requires_grad
    if formats.are_default or is_frozen:
        return
    asked = ", ".join(_asked(formats))
    if param.dtype == torch.float64:
        raise TypeError(
            f"{name} is torch.float64, and its group has {asked}; expected float32, bfloat16 or "
            "float16, or a group of its own with None for these options"
        )
    check_shards(group, param, name)
    stochastic = formats.rounding == "stochastic" and not formats.has_rest(param)
    if stochastic and param.dtype == torch.float16:
        raise TypeError(
            f"{name} is torch.float16, and rounding='stochastic' rounds weights at random, which "
            "is for bfloat16; expected master_weights='exact' or '24bit', or rounding=None"
        )


def check_shards(group: Group, param: Any, name: str) -> None:
    """Refuses states of 8 bits for a DTensor whose shards cut blocks, or deal them unlike torch."""
    if not formats_of(group).in_blocks or not is_subclass(param):
        return
    beside = "its group has state_dtype='8bit'"
    otherwise = "or torch.bfloat16, torch.float32 or None"
    if not is_dtensor(param):
        raise TypeError(
            f"{name} is a {type(param).__name__}, and {beside}; expected a plain tensor or a "
            f"DTensor, {otherwise}"
        )
    first, number = first_element(param), local_of(param).numel()
    placed = f"{name} is a DTensor with placements {param.placements}"
    if first is None:
        raise ValueError(
            f"{placed}, and {beside}, whose blocks are {BLOCK_SIZE} neighbors in memory; expected "
            f"one that is cut along its first dimension only, {otherwise}"
        )
    end = first + number
    blocks = num_blocks(number)
    cuts = number > 0 and (first % BLOCK_SIZE or (end % BLOCK_SIZE and end != param.numel()))
    if cuts or not is_cut_alike(param, num_blocks(param.numel()), first // BLOCK_SIZE, blocks):
        raise ValueError(
            f"{placed}, of which this rank has the elements {first} to {end} of {param.numel()}, "
            f"and {beside}, whose blocks of {BLOCK_SIZE} elements would be cut or dealt unevenly; "
            f"expected shards of as many whole blocks on every rank, {otherwise}"
        )


def check_codes(rule: Rule, group: Group, state: dict[str, Any], name: str) -> None:
    """Refuses codes of 8 bits that no step has left."""
    for key in (it for it in rule.states(group) if it in rule.codings):
        codes = keys_of(key)[0]
        expected = CODE_DTYPES[rule.codings[key]]
        if codes in found_keys(rule, group, key, state) and state[codes].dtype != expected:
            raise TypeError(
                f"state {codes!r} of {name} is {state[codes].dtype}; expected {expected}"
            )


def check_scales(scales: Tensor, name: str, param: Tensor) -> None:
    """Refuses scales of another number of blocks, or of another dtype."""
    if scales.dtype != torch.float32:
        raise TypeError(f"{name} is {scales.dtype}; expected torch.float32")
    if scales.shape != (blocks := num_blocks(param.numel()),):
        raise RuntimeError(
            f"{name} has shape {tuple(scales.shape)}; expected ({blocks},): one number for every "
            f"{BLOCK_SIZE} elements of the parameter"
        )


def check_rest(param: Tensor, state: dict[str, Any], name: str) -> None:
    """Refuses a `param_rest` that no step has left."""
    rest = state.get(REST)
    if rest is None:
        return
    found = rest.dtype if isinstance(rest, Tensor) else f"a {type(rest).__name__}"
    if found not in REST_DTYPES.values():
        raise TypeError(f"state {REST!r} of {name} is {found}; expected torch.int16 or torch.int8")
    if rest.shape != param.shape:
        raise RuntimeError(
            f"state {REST!r} of {name} has shape {tuple(rest.shape)}; expected the parameter's "
            f"{tuple(param.shape)}"
        )


def warn_once_of_naive_params(param_groups: list[Group]) -> None:
    """Logs, once in a process, what training 16-bit parameters without masters costs."""
    global _has_warned
    if _has_warned or not any(map(_has_naive_params, param_groups)):
        return
    _has_warned = True
    log.warning(
        "16-bit parameters are trained without master weights: most updates are smaller than "
        "half a unit of a weight's last bit, and are lost. master_weights='exact' keeps the bits "
        "that are missing to float32, with 2 more bytes per parameter. "
        "logging.getLogger('fusedopt').setLevel('ERROR') silences this"
    )


def _has_naive_params(group: Group) -> bool:
    formats = formats_of(group)
    return any(
        param.grad is not None
        and param.dtype in HALF_DTYPES
        and not formats.has_rest(param)
        and not formats.rounds_param(param)
        for param in group["params"]
    )


def _asked(formats: Formats) -> list[str]:
    return [f"{key}={value!r}" for key, value in formats._asdict().items() if value is not None]
