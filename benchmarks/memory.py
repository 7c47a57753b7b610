"""The bytes that an optimizer stores, and the most that a step needs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from benchmarks.timing import Step

_PROCESS = Path("/proc/self")
_PEAK_IS_NOW = "5"  # see proc(5), clear_refs


def stored_bytes(optimizer: Optimizer) -> int:
    """Of all parameters and states; memory that several tensors share counts once."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    states = [optimizer.state[param] for param in params if param in optimizer.state]
    found: dict[int, int] = {}
    for tensor in _plain_tensors([params, states]):
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def _plain_tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__"):
        names, _ = value.__tensor_flatten__()  # pyright: ignore[reportAttributeAccessIssue]
        value = [getattr(value, name) for name in names]
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _plain_tensors(item)


def extra_bytes(step: Step, device: str) -> int | None:
    """The bytes of memory that one step needs beside what is there; None: nothing tells.

    A CPU's are those of the whole process, as Linux counts them: in pages.
    """
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        (_PROCESS / "clear_refs").write_text(_PEAK_IS_NOW)
    except OSError:
        return None
    before = _kilobytes("VmRSS")
    step()
    return max(0, _kilobytes("VmHWM") - before) * 1024


def _kilobytes(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", (_PROCESS / "status").read_text())
    assert found is not None
    return int(found[1])
