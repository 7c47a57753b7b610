"""Which backends this build has, and which one a parameter's device asks for."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fusedopt.reference import Group, Rule

if TYPE_CHECKING:
    from fusedopt._C import Plan

try:
    from fusedopt import _C
except ImportError as error:  # not built, or built for another torch
    _C = None
    import_error: str | None = str(error)
else:
    import_error = None

_warned: set[str] = set()


def device_type_of(backend: str) -> str:
    """The device type that a backend's tensors live on."""
    return _C.cuda_device_type if backend == "cuda" and _C is not None else backend


def why_missing(backend: str) -> str | None:
    """Why a compiled backend can't be used here, or None if it can."""
    if _C is None:
        return f"the compiled extension can't be imported ({import_error})"
    if backend == "cuda" and not _C.built_with_cuda:
        return "fusedopt was built without CUDA kernels (no nvcc was found)"
    if backend == "cuda" and _C.cuda_device_type == "cuda" and not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return None


def choose(backend: str | None, devices: Iterable[torch.device]) -> str | None:
    """The backend to use for parameters on these devices.

    Returns "reference", or what was asked for; None stands for the compiled kernels of each
    parameter's own device.

    Raises:
        RuntimeError: the backend that was asked for can't be used here.
    """
    if backend == "reference":
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
            warn_once(f"fusedopt: {reason}; its steps run in plain torch, correct but slow")
            return "reference"
    return None


def new_plan(
    backend: str | None,
    rule: Rule,
    param_groups: list[Group],
    state: dict[Tensor, dict[str, Tensor]],
    counters: dict[Tensor, Tensor],
    rings: list[Tensor],
) -> Plan | None:
    """What the compiled backends look up once and keep; None for the reference."""
    if backend == "reference" or _C is None:
        return None
    return _C.Plan(rule.name, backend or "", param_groups, state, counters, rings)


def zeros_like(param: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """As torch's, in memory that a step walks fast: a large state lies in huge pages."""
    value = torch.empty_like(param, dtype=dtype, requires_grad=False)
    if _C is not None and value.device.type == "cpu":
        _C.prefer_huge_pages(value)
    return value.zero_()


def warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=2)
