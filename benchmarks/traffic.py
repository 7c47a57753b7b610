"""Counts the bytes that a step moves, from the operators that it calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.timing import Step

WRITE_ONLY = ("copy_", "zero_", "fill_", "_foreach_copy_", "_foreach_zero_")


class Traffic(TorchDispatchMode):
    """Adds up the bytes that operators read and write: each tensor argument and new result once.

    It sees only calls that pass torch's dispatcher: nothing inside a compiled graph, or inside a
    library that takes pointers. Temporary memory inside an operator doesn't count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if func.is_view or name.startswith("empty"):
            return result
        inputs = set()
        for index, argument in enumerate(func._schema.arguments):
            given = args[index] if index < len(args) else kwargs.get(argument.name)
            writes = argument.alias_info is not None and argument.alias_info.is_write
            if name.startswith("_fused") and argument.name == "grads":
                writes = kwargs.get("grad_scale") is not None  # else only read, whatever it says
            times = 2 if writes and name not in WRITE_ONLY else 1
            for tensor in tensors_in(given):
                inputs.add(tensor.data_ptr())
                self.bytes += times * size_of(tensor)
        for tensor in tensors_in(result):
            if tensor.data_ptr() not in inputs:
                self.bytes += size_of(tensor)
        return result


def tensors_in(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def size_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def count(step: Step) -> int:
    """The bytes that one call of `step` moves."""
    with torch.no_grad(), Traffic() as traffic:
        step()
    return traffic.bytes
