"""The fastest that a step's memory traffic goes on this machine, measured beside the steps.

A step reads the parameter, its states and the gradient, and writes all but the gradient, in place.
A copy or a read-only sum would be another pattern with another speed.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import subprocess
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.timing import Step

SOURCE = Path(__file__).with_name("ceiling.cpp")
# Not -ffast-math: a library linked with it switches subnormal numbers off where it is loaded.
SUMS_IN_ANY_ORDER = ["-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math"]
FLAGS = ["-O3", "-march=native", *SUMS_IN_ANY_ORDER, "-fopenmp", "-shared", "-fPIC"]
BLOCKS = (1 << 12, 1 << 15, 1 << 18)  # elements


def make_ceiling(elements: int, written: int, measure: bool, device: str) -> Step:
    """A function that moves what a step on `elements` float32 moves.

    Args:
        elements: of each array; 16-bit ones count half.
        written: how many arrays are read and written: the parameter and its states.
        measure: whether the gradient is read once more beforehand, for a norm.
    """
    arrays = [torch.randn(elements, device=device) for _ in range(written + 1)]
    return on_cpu(arrays, measure) if device == "cpu" else compiled(arrays, measure)


def on_cpu(arrays: list[Tensor], measure: bool) -> Step:
    """The C++ loop, with the number of threads and the block size that are fastest here."""
    stream = library().stream
    pointers = (ctypes.c_void_p * len(arrays))(*(array.data_ptr() for array in arrays))
    elements = ctypes.c_int64(arrays[0].numel())

    def make(threads: int, block: int) -> Step:
        arguments = (pointers, len(arrays) - 1, elements, measure, threads, ctypes.c_int64(block))
        return lambda: (stream(*arguments), arrays)  # which keeps the arrays alive

    def best_of(step: Step) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        return min(times)

    threads = {1, torch.get_num_threads()}
    return min((make(t, block) for t in threads for block in BLOCKS), key=best_of)


def library() -> ctypes.CDLL:
    """ceiling.cpp for this processor; built once, into build/benchmarks."""
    key = hashlib.sha256(repr((SOURCE.read_text(), FLAGS, cpu_flags())).encode()).hexdigest()
    path = SOURCE.parent.parent / "build" / "benchmarks" / f"ceiling-{key[:12]}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        compiler = os.environ.get("CXX", "c++").split()
        subprocess.run([*compiler, *FLAGS, str(SOURCE), "-o", str(part)], check=True)
        part.replace(path)
    return ctypes.CDLL(str(path))


def cpu_flags() -> str:
    """What decides which instructions -march=native means."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def compiled(arrays: list[Tensor], measure: bool) -> Step:
    """The same for a GPU, in two kernels that torch generates."""
    *written, grad = arrays
    read = torch.compile(lambda grad: grad.sum())

    @torch.compile
    def update(written: list[Tensor], grad: Tensor) -> None:
        for array in written:
            array.mul_(0.5).add_(grad)

    def step() -> None:
        if measure:
            read(grad)
        update(written, grad)

    return step
