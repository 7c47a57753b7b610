"""Finds the tensors of a checkpoint that an optimizer may write to without a copy."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

Interval = tuple[int, int]  # the first address, and the one after the last


def to_take_over(tensors: Iterable[Tensor], beside: Iterable[Tensor]) -> set[int]:
    """The ids of the tensors that, as far as is known, nothing else reads or writes.

    torch takes over every tensor of the right device and dtype. Writing to it is wrong if

    * autograd or inference mode watches the tensor;
    * its memory is a file's, read-only, or another process's: `torch.load(mmap=True)`;
    * it shares memory with another one of the tensors, or with one of `beside`.

    If the `state_dict()` of a live optimizer is loaded without a copy, both optimizers share its
    tensors, as with torch. This function can't see that.
    """
    good = [tensor for tensor in tensors if _is_plain(tensor)]
    others = {id(tensor): tensor for tensor in beside if _has_memory(tensor)}
    maps = None
    if any(_may_be_mapped(tensor) for tensor in good):
        maps = private_memory()
    good = [it for it in good if not _may_be_mapped(it) or _is_within(_extent(it), maps)]
    shared = set(_overlapping([*good, *others.values()]))
    return {id(tensor) for tensor in good} - shared


def private_memory() -> list[Interval] | None:
    """The memory that only this process can write to, in order. None if the system doesn't tell."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found: list[Interval] = []
    for line in lines:
        addresses, access, _, _, inode, *_ = line.split()
        if access.startswith("rw-p") and inode == "0":
            first, end = (int(address, 16) for address in addresses.split("-"))
            if found and found[-1][1] == first:
                first = found.pop()[0]
            found.append((first, end))
    return found


def _is_plain(tensor: Tensor) -> bool:
    return (
        _has_memory(tensor)
        and not tensor.is_inference()
        and not tensor.requires_grad
        and not tensor.is_neg()
        and not tensor.is_conj()
    )


def _has_memory(tensor: Tensor) -> bool:
    dispatch = getattr(type(tensor), "__torch_dispatch__", None)
    return (
        dispatch is torch._C._disabled_torch_dispatch_impl
        and not torch.nn.parameter.is_lazy(tensor)
        and tensor.layout == torch.strided
        and not tensor.is_nested
        and tensor.device.type != "meta"
    )


def _may_be_mapped(tensor: Tensor) -> bool:
    """Whether the memory may not be torch's own, but a file's, NumPy's, or another process's."""
    storage = tensor.untyped_storage()
    on_cpu = tensor.device.type == "cpu" and tensor.numel() > 0
    return on_cpu and (not storage.resizable() or storage.is_shared())


def _is_within(extent: Interval, maps: list[Interval] | None) -> bool:
    if not maps:
        return False
    first, end = maps[bisect.bisect_right(maps, (extent[0], 2**64)) - 1]
    return first <= extent[0] and extent[1] <= end


def _extent(tensor: Tensor) -> Interval:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    first = tensor.data_ptr()
    return first, first + (last + 1) * tensor.element_size()


def _overlapping(tensors: list[Tensor]) -> Iterator[int]:
    """The ids of the tensors that share memory with another one of them."""
    extents = sorted(
        (str(tensor.device), *_extent(tensor), id(tensor)) for tensor in tensors if tensor.numel()
    )
    before = ("", 0, 0, 0)  # the tensor so far that ends last
    for extent in extents:
        if extent[0] == before[0] and extent[1] < before[2]:
            yield from (before[3], extent[3])
        if extent[0] != before[0] or extent[2] > before[2]:
            before = extent
