"""The backends of this build, and the choice between them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fusedopt import reference
from fusedopt.core import agreement, extension, fallback
from fusedopt.core.check_formats import warn_once_of_naive_params
from fusedopt.core.plan import Plan
from fusedopt.distributed import LocalView
from fusedopt.reference import Group, Rule, distinct_params
from fusedopt.reference.arithmetic import is_subclass
from fusedopt.reference.formats import formats_of

_warned: set[str] = set()

REFERENCE, TORCH = "reference", "torch"  # "torch": torch's own functions, see `fallback`


def warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=2)


found = agreement.checked(extension.find(torch.__version__))
_C: Any = found.module


def device_type_of(backend: str) -> str:
    """The device type that a backend's tensors live on."""
    return _C.cuda_device_type if backend == "cuda" and _C is not None else backend


def why_missing(backend: str) -> str | None:
    """Why a compiled backend can't be used here, or None if it can."""
    if _C is None:
        return found.reason
    if backend == "cuda" and not _C.built_with_cuda:
        why = found.record.get("no_cuda") or "the build left no word of why"
        return f"fusedopt was built without CUDA kernels: {why}"
    if backend == "cuda" and _C.cuda_device_type == "cuda" and not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return None


def choose(
    backend: str | None, devices: Iterable[torch.device], exact_for: str | None = None
) -> str | None:
    """The backend to use for parameters on these devices.

    Args:
        exact_for: a setting, in words, that torch's own functions can't serve, or None.

    Returns:
        `backend` if it was given. Else None for the compiled kernels of each parameter's device; if
        there are none, "torch" for torch's own functions, or "reference".

    Raises:
        RuntimeError: the backend that was asked for can't be used here.
    """
    if backend == REFERENCE:
        return backend
    if backend is not None:
        reason = why_missing(backend)
        if reason is not None:
            raise RuntimeError(f"backend={backend!r} can't be used: {reason}")
        return backend
    for device_type in {device.type for device in devices}:
        known = device_type in ("cpu", "cuda")
        reason = why_missing(device_type) if known else f"there are no kernels for {device_type}"
        if reason is not None:
            return _without_kernels(reason, exact_for)
    return None


def _without_kernels(reason: str, exact_for: str | None) -> str:
    if exact_for is None:
        warn_once(f"fusedopt runs on torch's own functions, without its compiled kernels: {reason}")
        return TORCH
    warn_once(
        f"fusedopt runs on its reference, which is slow: torch's own functions can't do {exact_for}"
        f", and there are no compiled kernels: {reason}"
    )
    return REFERENCE


def new_plan(
    backend: str | None,
    rule: Rule,
    param_groups: list[Group],
    state: dict[Tensor, dict[str, Tensor]],
    counters: dict[Tensor, Tensor],
    rings: list[Tensor],
    first_elements: Mapping[Tensor, int],
) -> Plan | None:
    """A plan for steps; None for the reference.

    `first_elements`: of parameters that are parts of whole tensors, the index of their element 0
    there.
    """
    warn_once_of_naive_params(param_groups)
    if backend == TORCH:
        return fallback.TorchPlan(rule, param_groups, state, counters)
    if backend == REFERENCE or _C is None:
        return None
    agreement.check_rule(rule, _C.constants)
    formats = [formats_of(group) for group in param_groups]
    if all(it.are_default for it in formats):
        return _C.Plan(rule.name, backend or "", param_groups, state, counters, rings)
    asked = [it.for_kernels(rule) for it in formats]
    first = [first_elements.get(param, 0) for _, param in distinct_params(param_groups)]
    return _C.Plan(rule.name, backend or "", param_groups, state, counters, rings, asked, first)


def new_view() -> LocalView:
    """A view of sharded parameters."""
    return LocalView(compiled)


def compiled() -> Any:
    """The extension, or None if nothing is compiled."""
    return _C


def clip_grads(
    backend: str | None, grads: list[Tensor], *request: Any
) -> tuple[Tensor | None, bool] | None:
    """Clips gradients that have been checked; see `reference.clip_grads`."""
    chosen = choose(backend, (grad.device for grad in grads))
    if chosen == TORCH:
        return fallback.clip_grads(grads, *request)
    if chosen == REFERENCE:
        return reference.clip_grads(grads, *request)
    return _C.clip_grads(grads, False, True, backend or "", *request)


def zeros_like(param: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The same as torch's, but a large tensor gets huge pages, which a step reads faster."""
    if is_subclass(param):  # a DTensor
        return torch.zeros_like(param, dtype=dtype, requires_grad=False)
    value = torch.empty_like(param, dtype=dtype, requires_grad=False)
    if _C is not None and value.device.type == "cpu":
        _C.prefer_huge_pages(value)
    return value.zero_()
