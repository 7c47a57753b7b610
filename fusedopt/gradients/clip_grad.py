"""Clipping by itself, for any optimizer: `torch.nn.utils.clip_grad_norm_` and its two halves."""

from __future__ import annotations

import math
import types
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from fusedopt import reference
from fusedopt.clip import AdaptiveClip
from fusedopt.core import backends, check_settings
from fusedopt.core.checked_grads import checked_grads
from fusedopt.core.nonfinite import check_choice
from fusedopt.core.optimizer import Backend
from fusedopt.core.rank_clip import RankClip, find_ranks, with_local_grads
from fusedopt.core.settings import Plain
from fusedopt.distributed import whole

_FUSED_NORM_TYPES = (2.0, math.inf)


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    backend: Backend | None = None,
    process_group: ProcessGroup | DeviceMesh | None = None,
    plain: Plain = "replicated",
) -> Tensor:
    """Clips the gradients of parameters in place, by their global norm.

    It works as `torch.nn.utils.clip_grad_norm_`. One pass over the gradients measures the norm. If
    the norm is too large, a second pass multiplies them by `min(1, max_norm / (norm + 1e-6))`. It
    differs from torch's function in these points:

    * The norm neither overflows nor underflows, and the coefficient is float64. So 16-bit gradients
      and gradients near float32's largest number are measured and clipped correctly.
    * `max_norm=inf` measures only, and leaves nan and inf as they are.
    * A gradient that is listed twice counts twice in the norm, and is scaled once.

    It waits for the device only with `error_if_nonfinite`, if gradients are on both CPU and CUDA,
    and over several ranks.

    If parameters are DTensors (FSDP2, tensor parallelism), or with `process_group`, all ranks must
    call it together. They exchange one message (for orders other than 2, each rank also gathers one
    number from every other rank). All ranks get the same norm to the bit, the same as an
    optimizer's `grad_norm`.

    Args:
        parameters: one or more tensors; those without a gradient are ignored. The gradients are
            float32, float64, bfloat16 or float16, of any shape and strides, in any mix.
        max_norm: the largest norm that is not clipped.
        norm_type: the order of the norm. 2 and inf run in fused kernels, all others in torch.
        error_if_nonfinite: raise if the norm is inf or nan, and leave the gradients as they were.
        foreach: without effect.
        backend: "cuda", "cpu", "reference" (plain torch), or None, which goes by the gradients'
            device.
        process_group: the ranks that clip together: a ProcessGroup or a DeviceMesh. With None, the
            parameters that are DTensors tell the ranks: their mesh, or the common root of their
            meshes.
        plain: the meaning of parameters that are no DTensors: "replicated" if all ranks hold the
            same ones, "own" if each rank has its own.

    Returns:
        The norm before clipping: 0-d float32, or float64 if a gradient on any rank is float64, on
        the first gradient's device.

    Raises:
        ValueError: an argument is not one of those above.
        PeerError: another rank refused the call. Nothing has been changed here.
        RuntimeError: the norm is inf or nan, and `error_if_nonfinite` is set.
        TypeError, RuntimeError: a gradient is sparse, complex, expanded or unsuitable in another
            way; the message names it. Nothing has been changed.
    """
    if isinstance(parameters, types.GeneratorType):
        parameters = list(parameters)
        if not parameters:
            warnings.warn(
                "`parameters` is an empty generator, no gradient clipping will occur.",
                stacklevel=2,
            )
    tensors = _as_list(parameters)
    among = (process_group, plain)
    return _clip(tensors, True, max_norm, norm_type, error_if_nonfinite, backend, *among)


def get_total_norm(
    tensors: Tensor | Iterable[Tensor],
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    backend: Backend | None = None,
    process_group: ProcessGroup | DeviceMesh | None = None,
    plain: Plain = "replicated",
) -> Tensor:
    """The global norm of tensors, such as gradients: `clip_grad_norm_` without the clipping.

    It works as `torch.nn.utils.get_total_norm`. Arguments, result and errors are those of
    `clip_grad_norm_`, but it measures `tensors` themselves, and they may be expanded.
    """
    among = (process_group, plain)
    return _clip(_as_list(tensors), False, math.inf, norm_type, error_if_nonfinite, backend, *among)


def clip_grads_with_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    total_norm: Tensor | float,
    foreach: bool | None = None,
    *,
    backend: Backend | None = None,
) -> None:
    """Clips the gradients of parameters in place, by a norm that is already known.

    It works as `torch.nn.utils.clip_grads_with_norm_`. Arguments and errors are those of
    `clip_grad_norm_`.

    Args:
        total_norm: a number, or a tensor of one element of any dtype, on any device. A result of
            `get_total_norm` is rounded to float32. If that made it inf, the gradients are
            multiplied by 0 here, while `clip_grad_norm_` clips them correctly.

    Raises:
        ValueError: `total_norm` has more than one element.
    """
    if isinstance(total_norm, Tensor) and total_norm.numel() != 1:
        raise ValueError(
            f"total_norm has shape {tuple(total_norm.shape)}; expected a tensor of one element"
        )
    total_norm = whole(total_norm)  # torch's own functions return a DTensor
    run = _untraced_run if torch.compiler.is_compiling() else _run
    tensors = with_local_grads(_as_list(parameters))
    run(tensors, True, backend, float(max_norm), total_norm=total_norm)


def _clip(tensors: list[Tensor], *arguments: Any) -> Tensor:
    """Calls `_eager_clip`. torch.compile can't trace the kernels: the graph breaks around them."""
    clip = _untraced_clip if torch.compiler.is_compiling() else _eager_clip
    return clip(tensors, *arguments)


def _eager_clip(
    tensors: list[Tensor],
    of_params: bool,
    max_norm: float,
    norm_type: float,
    error_if_nonfinite: bool,
    backend: Backend | None,
    process_group: ProcessGroup | DeviceMesh | None,
    plain: Plain,
) -> Tensor:
    """Clips to `max_norm` (inf: never clips). Returns the norm in the dtype that callers get."""
    if isinstance(max_norm, AdaptiveClip):
        raise TypeError(
            f"max_norm is a {type(max_norm).__name__}; expected a number: limits that adapt are an "
            "optimizer's max_grad_norm"
        )
    max_norm, norm_type = float(max_norm), float(norm_type)
    ranks = find_ranks(tensors, process_group, check_settings.check_plain(plain))
    if ranks is not None:
        call = RankClip(ranks, tensors, of_params, backend)
        norm, wide = call.measure(max_norm, norm_type)
        _check_finite(norm, norm_type, error_if_nonfinite)
        if max_norm != math.inf:
            _run(call.grads, False, backend, max_norm, total_norm=norm)
        return norm.to(torch.float64 if wide else torch.float32)
    known = None
    if norm_type not in _FUSED_NORM_TYPES:
        tensors = checked_grads(tensors, of_params, backend, max_norm)
        of_params = False
        known = reference.total_norm(tensors, norm_type) if tensors else None
    norm, wide = _run(tensors, of_params, backend, max_norm, norm_type, error_if_nonfinite, known)
    if norm is None:
        return torch.tensor(0.0)
    _check_finite(norm, norm_type, error_if_nonfinite)
    return norm.to(torch.float64 if wide else torch.float32)


def _check_finite(norm: Tensor, norm_type: float, error_if_nonfinite: bool) -> None:
    if error_if_nonfinite and not math.isfinite(norm.item()):
        raise RuntimeError(
            f"The total norm of order {norm_type} for gradients from `parameters` is non-finite, "
            "so it cannot be clipped. To disable this error and scale the gradients by the "
            "non-finite norm anyway, set `error_if_nonfinite=False`"
        )


def _run(
    tensors: list[Tensor],
    of_params: bool,
    backend: Backend | None,
    max_norm: float,
    norm_type: float = 2.0,
    skip_nonfinite: bool = False,
    total_norm: Tensor | float | None = None,
) -> tuple[Tensor | None, bool]:
    """Measures the gradients, unless their norm is known, and scales them.

    Returns:
        The norm (0-d float64; None if there is no gradient), and whether a gradient is float64.
    """
    check_choice("backend", backend, check_settings.BACKENDS)
    request = (max_norm, norm_type, skip_nonfinite, total_norm)
    if backend != "reference" and backends._C is not None:
        done = backends._C.clip_grads(tensors, of_params, False, backend or "", *request)
        if done is not None:
            return done
    grads = checked_grads(tensors, of_params, backend, max_norm)
    done = backends.clip_grads(backend, grads, *request)
    if done is None:
        raise RuntimeError("fusedopt: these gradients passed all checks; please report")
    return done


def _as_list(tensors: Tensor | Iterable[Tensor]) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


_untraced_clip = _disable_dynamo(_eager_clip)
_untraced_run = _disable_dynamo(_run)
