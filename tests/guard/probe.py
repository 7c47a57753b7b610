"""Takes steps in a process of its own, between the calls of a counter that was loaded into it.

probe.py counts SHIM           prints, as JSON, what counts.c counted in each of COUNTS
probe.py instructions SHIM     INSTRUCTIONS, ELEMENTS under callgrind, which writes a file for each
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from collections.abc import Callable
from typing import Any

import torch

import fusedopt
from fusedopt.core import backends

# (tensors, elements of each, clipped, steps)
COUNTS = [
    (tensors, numel, clip, steps)
    for tensors, numel in ((1, 64), (1000, 64), (2, 1 << 20))
    for clip in (False, True)
    for steps in (16, 32)
]
INSTRUCTIONS = [
    (tensors, 64, clip, steps)
    for tensors in (10, 1000)
    for clip in (False, True)
    for steps in (2, 4)
]
# (class, options, dtype of the parameter, of the gradient, elements, telemetry, steps): every loop
# over elements
ELEMENTS = [
    (name, options, param, grad, 16384, telemetry, 1)
    for name, options in (
        ("Adam", {}),
        ("Adam", {"amsgrad": True}),
        ("NAdam", {}),
        ("RMSprop", {}),
        ("RMSprop", {"momentum": 0.9}),
        ("RMSprop", {"centered": True}),
        ("RMSprop", {"centered": True, "momentum": 0.9}),
        ("SGD", {}),
        ("SGD", {"momentum": 0.9}),
        ("AdamW", {"cautious": True}),
        ("Lion", {"cautious": True}),
    )
    for param, grad in (
        ("float32", "float32"),
        ("float64", "float64"),
        ("bfloat16", "bfloat16"),
        ("float16", "float16"),
        ("bfloat16", "float32"),
        ("float16", "float32"),
    )
    for telemetry in (None, 2)
]


def element_step(
    name: str, options: dict[str, Any], dtype: str, grad: str, numel: int, telemetry: int | None
) -> Callable[[], None]:
    param: Any = torch.nn.Parameter(torch.randn(numel).to(getattr(torch, dtype)))
    param.grad_dtype = getattr(torch, grad)
    param.grad = torch.randn(numel, dtype=param.grad_dtype)
    optimizer = getattr(fusedopt, f"Fused{name}")(
        [param], lr=1e-3, max_grad_norm=1.0, telemetry=telemetry, **options
    )
    for _ in range(2):
        optimizer._fused_step()
    return optimizer._fused_step


def steady_step(tensors: int, numel: int, clip: bool) -> Callable[[], None]:
    """The step of an optimizer that has taken some steps before.

    Without torch's wrapper of `Optimizer.step`, which calls hooks and the profiler.
    """
    params = [torch.nn.Parameter(torch.randn(numel)) for _ in range(tensors)]
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer = fusedopt.FusedAdamW(params, max_grad_norm=1.0 if clip else None)
    for _ in range(4):
        optimizer._fused_step()
    return optimizer._fused_step


def count(library: ctypes.CDLL, step: Callable[[], None], steps: int) -> tuple[int, int]:
    """Heap allocations and OpenMP regions of so many steps."""
    times = range(steps)
    library.counts_start()
    library.counts_stop()
    library.counts_start()
    for _ in times:
        step()
    library.counts_stop()
    return library.counts_allocations(), library.counts_regions()


def main(kind: str, shim: str) -> None:
    library = ctypes.CDLL(shim)
    gc.disable()
    result = []
    if kind == "counts":
        for *what, steps in COUNTS:
            result.append((what, steps, count(library, steady_step(*what), steps)))
    else:
        prepared = [(what, steps, steady_step(*what)) for *what, steps in INSTRUCTIONS]
        prepared += [(what, steps, element_step(*what)) for *what, steps in ELEMENTS]
        library.instructions_begin()
        for what, steps, step in prepared:
            times = range(steps)
            library.instructions_dump()
            for _ in times:
                step()
            library.instructions_dump()
            result.append((what, steps))
    assert backends._C is not None
    print(json.dumps({"isa": backends._C.cpu_isa(), "result": result}))


if __name__ == "__main__":
    main(*sys.argv[1:])
