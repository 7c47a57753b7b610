"""Arrays as a step takes them: views, checks by name, and memory that overlaps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedopt.core import c_library

Array = NDArray[Any]


def view(name: str, value: Any) -> Array:
    """The array itself, or a view of an object that speaks DLPack.

    Raises:
        TypeError: it is neither, or its memory can't be shared.
    """
    if isinstance(value, np.ndarray):
        return value
    if not hasattr(value, "__dlpack__"):
        raise TypeError(
            f"{name} is a {type(value).__name__}; expected a NumPy array, or an array of another "
            "library on the CPU (DLPack)"
        )
    try:
        return np.from_dlpack(value)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise TypeError(f"{name}, a {type(value).__name__}, can't be shared: {error}") from error


def dtype_code(name: str, array: Array) -> int:
    """The index of the array's dtype in `Library.dtypes`.

    Raises:
        TypeError: the kernels have no such dtype.
    """
    known = c_library.load().dtypes
    if array.dtype.name not in known or not array.dtype.isnative:
        raise TypeError(f"{name} is {array.dtype!r}; expected one of {', '.join(known)}")
    return known.index(array.dtype.name)


def check_layout(name: str, array: Array) -> None:
    """Refuses an array whose elements do not lie one after another in C's order."""
    if not (array.flags.c_contiguous and array.flags.aligned):
        raise ValueError(
            f"{name} has the strides {array.strides}; expected a contiguous, aligned array in C's "
            "order: np.ascontiguousarray makes one"
        )


def check_array(name: str, value: Any) -> None:
    """Refuses what is no array of NumPy."""
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{name} is a {type(value).__name__}; expected a NumPy array")


def check_like(name: str, array: Array, param: Array) -> None:
    """Refuses a state or a gradient that doesn't fit its parameter."""
    if array.dtype != param.dtype:
        raise TypeError(f"{name} is {array.dtype!r}; expected {param.dtype!r}")
    if array.shape != param.shape:
        raise ValueError(f"{name} has the shape {array.shape}; expected {param.shape}")
    check_layout(name, array)


def check_writable(name: str, array: Array) -> None:
    """Refuses an array that can't be written."""
    if not array.flags.writeable:
        raise ValueError(f"{name} is read-only; expected a writable array")


def address(array: Array) -> int:
    """Where the array's first element lies."""
    return array.__array_interface__["data"][0]


class Written:
    """The arrays that a step writes, none of which may share memory with another array."""

    def __init__(self, names: Sequence[str], arrays: Sequence[Array]) -> None:
        """Raises ValueError if two of them overlap."""
        kept = [index for index, array in enumerate(arrays) if array.size > 0]
        starts = np.array([address(arrays[index]) for index in kept], np.int64)
        order = np.argsort(starts)
        self._names = [names[kept[index]] for index in order]
        self._starts = starts[order]
        sizes = np.array([arrays[index].nbytes for index in kept], np.int64)
        self._ends = self._starts + sizes[order]
        for index in np.flatnonzero(self._ends[:-1] > self._starts[1:])[:1]:
            self._refuse(self._names[index + 1], int(index))

    def check_apart(self, addresses: NDArray[np.int64], sizes: NDArray[np.int64]) -> None:
        """Refuses gradients, at these addresses (0: there is none), that share written memory."""
        if len(self._starts) == 0:
            return
        before = np.searchsorted(self._starts, addresses + sizes) - 1
        overlap = (before >= 0) & (self._ends[before] > addresses) & (sizes > 0) & (addresses != 0)
        for index in np.flatnonzero(overlap)[:1]:
            self._refuse(f"grads[{index}]", int(before[index]))

    def _refuse(self, name: str, written: int) -> None:
        raise ValueError(
            f"{name} shares memory with {self._names[written]}, which the step writes; expected "
            "arrays with memory of their own"
        )
