"""Measures how fast this machine can move the bytes of a step, in the same run as the steps.

A step reads the parameter, its states and the gradient, and writes all but the gradient, in place.
A copy or a read-only sum would have another pattern and another speed.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import os
import platform
import shutil
import statistics
import subprocess
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.peers import Unavailable
from benchmarks.timing import Step, timed

SOURCE = Path(__file__).with_name("ceiling.cpp")
# Not -ffast-math: a library that is linked with it disables subnormal numbers in the whole process.
SUMS_IN_ANY_ORDER = ["-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math"]
FLAGS = ["-O3", "-march=native", *SUMS_IN_ANY_ORDER, "-fopenmp", "-shared", "-fPIC"]
BLOCKS = (1 << 12, 1 << 15, 1 << 18)  # elements

GPU_FLAGS = ["-O3", "-std=c++17", "-shared", "-Xcompiler=-fPIC"]
VECTORS, THREADS = (1, 2, 4), (128, 256, 512)  # each thread's vectors in flight, a block's threads


def make_ceiling(elements: int, written: int, measure: bool, device: str) -> Step:
    """Returns a function that moves the bytes of a step.

    Args:
        elements: float32 elements of each array; count a 16-bit element as half.
        written: the number of arrays that are read and written: the parameter and its states. If it
            is 0, only the gradient is read.
        measure: whether to read the gradient once more first, as for a norm.
    """
    arrays = [torch.randn(elements, device=device) for _ in range(written + 1)]
    return on_cpu(arrays, measure) if device == "cpu" else on_gpu(arrays, measure)


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
    """ceiling.cpp, compiled for this processor."""
    return built(SOURCE, [*os.environ.get("CXX", "c++").split(), *FLAGS], cpu_flags())


def on_gpu(arrays: list[Tensor], measure: bool) -> Step:
    """The kernels of ceiling.cu, with the vectors and threads that are fastest here."""
    move = gpu_library().fusedopt_move

    def fastest(arrays: list[Tensor]) -> Step:
        pointers = (ctypes.c_void_p * len(arrays))(*(array.data_ptr() for array in arrays))
        elements = ctypes.c_int64(arrays[0].numel() // 4 * 4)

        def make(vectors: int, threads: int) -> Step:
            def step() -> None:
                stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
                error = move(pointers, len(arrays), elements, vectors, threads, stream)
                if error != 0:
                    raise RuntimeError(f"ceiling.cu: CUDA error {error}")

            return step

        ways = [make(*way) for way in itertools.product(VECTORS, THREADS)]
        return min(ways, key=lambda way: statistics.median(timed(way, "cuda") for _ in range(7)))

    read = fastest(arrays[-1:]) if measure else None
    update = fastest(arrays) if len(arrays) > 1 else None

    def step() -> None:
        for each in filter(None, (read, update)):
            each()

    return lambda: (step(), arrays)  # which keeps the arrays alive


def gpu_library() -> ctypes.CDLL:
    """ceiling.cu, compiled for this GPU.
    Raises:
        Unavailable: there is no nvcc.
    """
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc", path=f"{home}/bin") or shutil.which("nvcc")
    if nvcc is None:
        raise Unavailable("the ceiling of a GPU is compiled with nvcc, and there is none")
    major, minor = torch.cuda.get_device_capability()
    target = f"-gencode=arch=compute_{major}{minor},code=sm_{major}{minor}"
    return built(SOURCE.with_suffix(".cu"), [nvcc, *GPU_FLAGS, target])


def built(source: Path, command: list[str], *key: str) -> ctypes.CDLL:
    """Compiles a source to a library in build/benchmarks, once for each command and key."""
    text = repr((source.read_text(), command, key))
    name = f"{source.name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.so"
    path = source.parent.parent / "build" / "benchmarks" / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        subprocess.run([*command, str(source), "-o", str(part)], check=True)
        part.replace(path)
    return ctypes.CDLL(str(path))


def cpu_flags() -> str:
    """The processor's features, which decide the instructions of -march=native."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
