"""The fastest that a GPU moves a step's bytes, measured beside the steps: see gpu_ceiling.cu."""

from __future__ import annotations

import ctypes
import itertools
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

SOURCE = Path(__file__).with_suffix(".cu")
VECTORS, THREADS = (1, 2, 4), (128, 256, 512)


def build(nvcc: str, folder: Path, architecture: str) -> Path:
    """Compiles the kernels for one architecture, such as 90."""
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "gpu_ceiling.so"
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    command = [nvcc, "-O3", "-std=c++17", target, "-shared", "-Xcompiler=-fPIC", SOURCE]
    subprocess.run([*command, "-o", library], check=True, capture_output=True, text=True)
    return library


class Ceiling:
    """Arrays, and a function that moves them in the way that was fastest here."""

    def __init__(self, library: Path, elements: int, written: int, measures: bool) -> None:
        """`written` arrays are read and written, one is read; `measures`: it is read once more."""
        self._move = ctypes.CDLL(str(library)).fusedopt_move
        self._move.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int64] + 2 * [ctypes.c_int]
        self._move.argtypes.append(ctypes.c_void_p)
        self.elements = elements // 4 * 4
        self.arrays = [torch.randn(self.elements, device="cuda") for _ in range(written + 1)]
        self.bytes = 4 * self.elements * (2 * written + 1 + measures)
        self._in_place = self._fastest(self.arrays)
        self._read = self._fastest(self.arrays[-1:]) if measures else None

    def __call__(self) -> None:
        if self._read is not None:
            self._read()
        self._in_place()

    def _fastest(self, arrays: list[torch.Tensor]) -> Callable[[], None]:
        pointers = (ctypes.c_void_p * len(arrays))(*(array.data_ptr() for array in arrays))

        def make(vectors: int, threads: int) -> Callable[[], None]:
            def move() -> None:
                stream = torch.cuda.current_stream().cuda_stream
                error = self._move(pointers, len(arrays), self.elements, vectors, threads, stream)
                if error != 0:
                    raise RuntimeError(f"gpu_ceiling.cu: CUDA error {error}")

            return move

        ways = [make(*way) for way in itertools.product(VECTORS, THREADS)]
        return min(ways, key=lambda way: statistics.median(times(way, 7)))


def times(step: Callable[[], object], repeats: int) -> list[float]:
    """Seconds between two events, after one more call to warm up."""
    step()
    result = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        step()
        last.record()
        last.synchronize()
        result.append(first.elapsed_time(last) / 1e3)
    return result


def copy_rate(elements: int = 1 << 30) -> list[float]:
    """Bytes read and written per second by a plain copy of that many float32."""
    source = torch.randn(elements, device="cuda")
    target = torch.empty_like(source)
    return [8 * elements / seconds for seconds in times(lambda: target.copy_(source), 15)]
