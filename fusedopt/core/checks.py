"""Refuses tensors, options and states that no step can use. The error names them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fusedopt.core.backends import device_type_of
from fusedopt.core.check_formats import (
    check_codes,
    check_formats,
    check_rest,
    check_rule_formats,
    check_scales,
)
from fusedopt.core.check_settings import OURS
from fusedopt.core.plan import Plan
from fusedopt.core.state_keys import found_keys, scale_keys
from fusedopt.reference import Group, Rule
from fusedopt.reference.arithmetic import DTYPES, can_be_updated, compute_dtype, is_subclass
from fusedopt.reference.formats import formats_of
from fusedopt.reference.groups import GROUP_SETTINGS, name_of
from fusedopt.reference.limits import Unit

DTYPE_NAMES = "float32, float64, bfloat16 or float16"
IMPLEMENTATION = ("foreach", "fused", "capturable", "differentiable")  # flags; ignored here

_TORCHS_WORDS = {"lr": "learning rate", "eps": "epsilon value", "betas": "beta parameter"}


def check_rows(limit: object, param: Tensor, name: str) -> None:
    """Refuses a parameter whose rows are not contiguous, if the limit is a `Unit`."""
    if not isinstance(limit, Unit) or torch.nn.parameter.is_lazy(param):
        return
    if is_left_alone(param) or param.dim() < 2:
        return
    dense = torch.empty_like(param, device="meta").stride()
    if param.numel() > 0 and param.shape[0] > 1 and dense[0] != param.numel() // param.shape[0]:
        raise ValueError(
            f"{name} has shape {tuple(param.shape)} and strides {param.stride()}; {limit} expects "
            "what one index of the first dimension selects to be contiguous in memory"
        )


def is_left_alone(param: Tensor) -> bool:
    """Whether no step touches the parameter: it has no gradient, and no step could apply one."""
    return param.grad is None and not can_be_updated(param)


def check_param(param: Tensor, name: str, backend: str | None) -> None:
    """Refuses a parameter that no step can update. Gradients are checked later.

    A frozen parameter may be of any kind. So may a parameter on the meta device without a gradient.
    """
    if not isinstance(param, Tensor):
        raise TypeError(f"{name} is a {type(param).__name__}; expected a tensor")
    if torch.nn.parameter.is_lazy(param):
        return  # no shape, no memory yet: the first step checks it
    if is_left_alone(param) and (not param.requires_grad or param.device.type == "meta"):
        return
    if is_subclass(param):
        raise TypeError(
            f"{name} is a {type(param).__name__}, a tensor subclass with operations of its own; "
            "expected a plain tensor or a DTensor"
        )
    layout = "nested" if param.is_nested else param.layout
    if layout != torch.strided:
        raise TypeError(f"{name} has layout {layout}; expected a dense tensor")
    if param.dtype not in DTYPES:
        raise TypeError(f"{name} is {param.dtype}; expected {DTYPE_NAMES}")
    check_device(param, name, backend)
    check_writable(param, name)


def check_writable(tensor: Tensor, name: str) -> None:
    """Refuses a tensor in which two elements share a place in memory."""
    if _overlaps_itself(tensor):
        raise RuntimeError(
            f"{name} has several elements in one memory location (shape {tuple(tensor.shape)}, "
            f"strides {tensor.stride()}); expected a tensor that is not expanded: .contiguous()"
        )


def check_device(tensor: Tensor, name: str, backend: str | None) -> None:
    """Refuses a tensor without data, or on a device that the given backend doesn't run on."""
    if tensor.device.type == "meta":
        raise RuntimeError(f"{name} is on the meta device, without data; expected cpu or cuda")
    if backend in ("cpu", "cuda") and tensor.device.type != device_type_of(backend):
        raise RuntimeError(
            f"{name} is on {tensor.device}, and backend={backend!r} was asked for; expected all "
            f"tensors on {device_type_of(backend)}"
        )


def check_readable(grad: Any, name: str) -> None:
    """Refuses a gradient that no kernel can read. `name` is "the gradient of ..."."""
    if not isinstance(grad, Tensor):
        raise TypeError(f"{name} is a {type(grad).__name__}; expected a tensor")
    if grad.layout != torch.strided:
        raise RuntimeError(f"{name} is sparse ({grad.layout}); sparse gradients are not supported")
    if is_subclass(grad):
        raise TypeError(f"{name} is a {type(grad).__name__}; expected a plain tensor")
    if grad.dtype not in DTYPES:
        raise TypeError(f"{name} is {grad.dtype}; expected {DTYPE_NAMES}")
    check_memory(grad, name)


def check_grad(param: Tensor, grad: Tensor, name: str) -> None:
    """Refuses a gradient that the step can't read."""
    check_readable(grad, f"the gradient of {name}")
    if grad.device != param.device:
        raise RuntimeError(
            f"the gradient of {name} is on {grad.device}; expected it on the parameter's "
            f"{param.device}"
        )
    if grad.shape != param.shape:
        raise RuntimeError(
            f"the gradient of {name} has shape {tuple(grad.shape)}; expected the parameter's "
            f"{tuple(param.shape)}"
        )
    check_memory(param, name)


def check_shared_memory(plan: Plan | None, param_groups: list[Group]) -> None:
    """Refuses two tensors that share memory and that a step would both write."""
    found = None if plan is None else plan.shared_memory()
    if found is None:
        return
    first, second = (
        f"{f'state {state!r} of ' if state else ''}{name_of(param_groups, group, index)}"
        for group, index, state in found
    )
    raise RuntimeError(
        f"{second} shares memory with {first}, and a fused step updates both at once; expected "
        "memory of its own: .clone() it, or list one parameter for both"
    )


def check_new_state(name: str, expected: str) -> None:
    """Refuses to make state while a CUDA graph is captured: every replay would make it again."""
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{name} has no state yet, and this step is captured in a CUDA graph: every replay "
            f"would begin anew; expected {expected} before the capture"
        )


def check_options(
    rule: Rule, index: int, group: Group, defaults: dict[str, Any], settings: dict[str, Any]
) -> None:
    """Refuses a param group that lacks an option, has a wrong one, or has one of our settings.

    `settings` are the optimizer's. A group may repeat them: ZeroRedundancyOptimizer does.
    """
    if ours := [key for key in OURS if key in group and group[key] != settings[key]]:
        raise ValueError(
            f"param group {index} has {', '.join(map(repr, ours))}, which one group can't have for "
            f"itself; expected it as an argument of the optimizer, or as its attribute"
        )
    for key in GROUP_SETTINGS:
        if type(value := group.get(key, True)) is not bool:
            raise TypeError(f"param group {index}'s {key} is {value!r}; expected True or False")
    check_formats(f"param group {index}'s ", group)
    if missing := [key for key in defaults if key not in group and key not in IMPLEMENTATION]:
        raise ValueError(
            f"param group {index} has no {', '.join(map(repr, missing))}, only "
            f"{', '.join(repr(key) for key in group if key not in ('params', *IMPLEMENTATION))}: "
            "is it another optimizer's?"
        )
    check_rule_formats(rule, group, index)
    if group.get("differentiable"):
        raise RuntimeError(
            "differentiable=True is not supported: autograd can't look into a fused step"
        )
    for key, default in defaults.items():
        if key in rule.counts or (key not in IMPLEMENTATION and _is_number(default)):
            count = rule.counts.get(key, 1)
            _check_numbers(group[key], f"param group {index}'s {key}", count)


def check_arguments(rule: Rule, options: dict[str, Any], error: Exception | None = None) -> None:
    """Refuses by name an option that is no number. `error`: what torch's constructor has raised."""
    for key, value in options.items():
        if key not in (*IMPLEMENTATION, "defaults"):
            try:
                _check_numbers(value, key, rule.counts.get(key, 1))
            except (TypeError, ValueError) as ours:
                raise ours from error


def check_lists(rule: Rule, options: dict[str, Any]) -> None:
    """Refuses by name an option that holds too many numbers, or too few."""
    for key in rule.counts.keys() & options.keys():
        _check_numbers(options[key], key, rule.counts[key])


def _check_numbers(value: Any, name: str, count: int) -> None:
    is_list = not (count == 1 and isinstance(value, Tensor)) and as_tuple(value) is not None
    numbers = (as_tuple(value) or ()) if is_list else (value,)
    for number in numbers:  # before torch reads or prints the number
        if type(number) is Tensor and number.layout == torch.strided:
            check_memory(number, name)
    if is_list != (count > 1) or len(numbers) != count or not all(map(_is_number, numbers)):
        raise (ValueError if is_list or isinstance(value, Tensor) else TypeError)(
            f"{name} is {value!r}; expected {'one number' if count == 1 else f'{count} numbers'}"
        )


def as_tuple(value: Any) -> tuple[Any, ...] | None:
    """The items of a sequence of any type. None if the value is no sequence."""
    if isinstance(value, str | bytes | Mapping):
        return None
    try:
        return tuple(value[i] for i in range(len(value)))
    except (TypeError, KeyError):
        return None


def normalize_options(rule: Rule, group: Group) -> None:
    """Turns other sequences into tuples, which checkpoints can keep and kernels can read."""
    for key in rule.counts.keys() & group.keys():
        numbers = as_tuple(group[key])
        if numbers is not None and not isinstance(group[key], tuple | list):
            group[key] = numbers


def checked_defaults(rule: Rule, defaults: dict[str, Any]) -> dict[str, Any]:
    """The defaults of a class that torch doesn't have, if none is refused."""
    check_arguments(rule, defaults)
    check_ranges("", rule, defaults, defaults)
    return defaults


def check_ranges(where: str, rule: Rule, group: Group, defaults: dict[str, Any]) -> None:
    """Refuses the values that torch's constructors refuse, in their words. Waits for no device.

    `where`: "" or "param group 0: ".
    """
    for key, default in defaults.items():
        if key in (*IMPLEMENTATION, *rule.any_sign) or not (
            key in rule.counts or _is_number(default)
        ):
            continue
        numbers = (as_tuple(group[key]) or ()) if key in rule.counts else (group[key],)
        for position, number in enumerate(numbers):
            on_device = isinstance(number, Tensor) and number.device.type != "cpu"
            if not (on_device or (number >= 0 and (number < 1 or key not in rule.counts))):
                what = _TORCHS_WORDS.get(key, f"{key} value")
                what += f" at index {position}" if key in rule.counts else ""
                span = "a number >= 0 and < 1" if key in rule.counts else "a number >= 0"
                raise ValueError(f"{where}Invalid {what}: {number}; expected {span}")


def check_state(rule: Rule, group: Group, param: Tensor, state: dict[str, Any], name: str) -> None:
    """Refuses a state that belongs to another optimizer, or to another parameter."""
    if not isinstance(state, dict):
        raise TypeError(f"the state of {name} is a {type(state).__name__}; expected a dict")
    found = [key for it in rule.states(group) for key in found_keys(rule, group, it, state)]
    missing = [key for key in (*rule.scalars, *found) if key not in state]
    if missing:
        raise RuntimeError(
            f"the state of {name} has no {', '.join(map(repr, missing))}, only "
            f"{', '.join(map(repr, state)) or 'nothing'}: is it another optimizer's?"
        )
    for key in rule.scalars:
        check_scalar(state[key], f"state {key!r} of {name}", counts=key == "step")
    for key in found:
        value = state[key]
        if not isinstance(value, Tensor) or is_subclass(value):
            raise TypeError(
                f"state {key!r} of {name} is a {type(value).__name__}; expected a plain tensor"
            )
        if value.layout != torch.strided or value.device.type == "meta":
            where = value.layout if value.layout != torch.strided else "on the meta device"
            raise TypeError(f"state {key!r} of {name} is {where}; expected a dense tensor")
        if key in scale_keys(rule):
            check_scales(value, f"state {key!r} of {name}", param)
        elif value.shape != param.shape:
            raise RuntimeError(
                f"state {key!r} of {name} has shape {tuple(value.shape)}; expected the parameter's "
                f"{tuple(param.shape)}"
            )
        check_memory(value, f"state {key!r} of {name}")
    check_codes(rule, group, state, name)
    if formats_of(group).has_rest(param):
        check_rest(param, state, name)


def check_scalar(value: Any, name: str, counts: bool) -> None:
    """Refuses a value that no step leaves behind. A value on a device is not read."""
    if isinstance(value, Tensor):
        if is_subclass(value) or value.layout != torch.strided:
            raise TypeError(f"{name} is a {type(value).__name__}; expected a plain tensor")
        check_memory(value, name)
    if not _is_number(value):
        raise RuntimeError(f"{name} is {value!r}; expected one number")
    if isinstance(value, Tensor) and value.device.type != "cpu":
        return
    number = float(value)
    if not (math.isfinite(number) and number >= 0 and (not counts or number == int(number))):
        expected = "a whole number >= 0" if counts else "a finite number >= 0"
        raise ValueError(f"{name} is {number}; expected {expected}")


def check_state_dtypes(
    rule: Rule, group: Group, param: Tensor, state: dict[str, Any], name: str
) -> None:
    """Refuses a state of a dtype that no kernel takes. (Loading converts such a state.)"""
    if formats_of(group).state_dtype is not None:
        return  # converts it
    dtypes = {param.dtype, compute_dtype(param.dtype)}
    names = [key for key in rule.states(group) if key in state]  # others have codes of 8 bits
    for key in names:
        if state[key].dtype not in dtypes:
            expected = " or ".join(sorted(map(str, dtypes)))
            raise TypeError(f"state {key!r} of {name} is {state[key].dtype}; expected {expected}")
    if len({state[key].dtype for key in names}) > 1:
        found = ", ".join(f"{key!r} is {state[key].dtype}" for key in names)
        raise TypeError(f"the state of {name} mixes dtypes: {found}; expected one for all")


def check_memory(tensor: Tensor, name: str) -> None:
    """Refuses a tensor whose storage was freed or cut. Libraries that shard or offload do so."""
    if tensor.numel() == 0:
        return
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    needed = (tensor.storage_offset() + last + 1) * tensor.element_size()
    if tensor.untyped_storage().nbytes() < needed:
        raise RuntimeError(
            f"{name} has a storage of {tensor.untyped_storage().nbytes()} bytes; expected {needed}"
        )


def _is_number(value: Any) -> bool:
    """Whether the value is one real number, or a tensor of one."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex() and value.device.type != "meta"
    try:
        float(value)
    except (TypeError, ValueError, OverflowError):
        return False
    return not isinstance(value, str | bytes)


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether two indices may name one location: a stride is not above the inner extent."""
    if tensor.numel() <= 1:
        return False
    dims = sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape) if size > 1)
    extent = 0
    for stride, size in dims:
        if stride <= extent:
            return True
        extent += stride * (size - 1)
    return False
