"""Which elements of the whole tensor a rank's part of a DTensor holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedopt.distributed.local_view import is_dtensor, local_of


def first_element(param: Any) -> int | None:
    """The index, in the whole tensor's memory, of this rank's first element; 0 of a plain tensor.

    Returns:
        None: this rank's elements are not neighbors there, as if not the first dimension is cut.
    """
    if not is_dtensor(param) or param.dim() == 0:
        return 0
    local: Tensor = local_of(param)
    if any(type(it).__name__ == "_StridedShard" for it in param.placements):
        return None
    if tuple(local.shape[1:]) != tuple(param.shape[1:]):
        return None
    if local.shape[0] == param.shape[0]:
        return 0
    row = param.numel() // max(1, param.shape[0])
    if local.numel() > 0 and local.shape[0] > 1 and local.stride(0) != row:
        return None  # the first dimension is not the outermost in memory
    return _cut(tuple(param.shape), param)[1][0] * row


def like(param: Any, local: Tensor, shape: tuple[int, ...] | None = None) -> Any:
    """A rank's tensor as a DTensor laid out over the mesh as a parameter is; else itself.

    Args:
        shape: of the whole tensor; None: the parameter's. It is contiguous then.
    """
    if not is_dtensor(param):
        return local
    from torch.distributed.tensor import DTensor  # loaded by whoever has a DTensor

    size = param.shape if shape is None else torch.Size(shape)
    stride = param.stride() if shape is None else _strides(shape)
    return DTensor.from_local(
        local, param.device_mesh, param.placements, run_check=False, shape=size, stride=stride
    )


def is_cut_alike(param: Any, length: int, first: int, number: int) -> bool:
    """Whether a tensor of one dimension, placed as a parameter, gives this rank these elements.

    Args:
        length: of the whole tensor.
        first, number: this rank's elements.
    """
    shape, offset = _cut((length,), param)
    return shape == (number,) and (number == 0 or offset == (first,))


def _cut(shape: tuple[int, ...], param: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    local, offset = compute_local_shape_and_global_offset(
        shape, param.device_mesh, param.placements
    )
    return tuple(local), tuple(offset)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return tuple(strides)
