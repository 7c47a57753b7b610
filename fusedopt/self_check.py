"""The self-check of `python -m fusedopt`: compares every class, bit by bit, with the reference."""

from __future__ import annotations

import argparse
import inspect
import logging
import math
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fusedopt
from fusedopt import front_ends
from fusedopt.core import backends, extension
from fusedopt.core.checks import DTYPES
from fusedopt.core.optimizer import FusedOptimizer

CLASSES = [
    it
    for it in (getattr(fusedopt, name) for name in fusedopt.__all__)
    if isinstance(it, type) and issubclass(it, FusedOptimizer) and it is not FusedOptimizer
]
SHAPES = ((), (3,), (33, 41), (0,), (20011,))
MATRICES = ((3, 2), (7, 40), (33, 41), (0, 3), (129, 130))  # for Muon
STEPS = 4
BACKENDS = ("cpu", "cuda")


def self_check(argv: Sequence[str]) -> int:
    """Returns the exit status: 1 if a check failed, or if steps here run without our kernels."""
    parser = argparse.ArgumentParser(
        prog="python -m fusedopt",
        description="Shows what this build has, and checks it, bit by bit, against the reference. "
        "The exit status is 1 where a check fails, or where nothing compiled runs.",
        epilog="`python -m fusedopt plot LOG` and `... watch LOG` show the log of a Monitor.",
    )
    parser.add_argument(
        "--backend", choices=("cpu", "cuda"), help="check only this one, which has to be usable"
    )
    wanted = parser.parse_args(argv).backend
    cuda = f"with CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    versions = f"torch {torch.__version__} {cuda}, Python {platform.python_version()}"
    print(f"fusedopt {fusedopt.__version__}, {versions}")
    print(f"Python files: {Path(fusedopt.__file__).parent}")
    for name, text in front_ends.describe().items():
        print(f"{name}: {text}")
    print(f"compiled extension: {describe_extension()}")
    if backends._C is None:
        print(f"NOT COMPILED: {backends.found.reason}")
        print("Steps run on torch's own functions, within some 3 times of torch.optim's time.")
        return 1
    with no_warnings():
        passed = all([check(name, wanted) for name in ([wanted] if wanted else BACKENDS)])
    print("all checks passed" if passed else "NOT ALL CHECKS PASSED: see the lines above")
    return 0 if passed else 1


@contextmanager
def no_warnings() -> Iterator[None]:
    """Hides this package's advice on training: the checks train nothing."""
    log = logging.getLogger("fusedopt")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def check(backend: str, wanted: str | None) -> bool:
    """Checks a backend on its devices. It may be missing if no device here needs it."""
    reason = backends.why_missing(backend)
    if reason is not None:
        print(f"{backend}: can't be used: {reason}")
        return wanted is None and not (backend == "cuda" and torch.cuda.is_available())
    passed = True
    for device in devices_of(backend):
        print(f"{device}: {describe(device)}; compared with the reference, bit by bit:", flush=True)
        results = {cls.__name__: same_as_reference(cls, backend, device) for cls in CLASSES}
        results["clip_grad_norm_"] = clips_as_reference(backend, device)
        width = max(map(len, results))
        for name, ok in results.items():
            print(f"    {name:{width}} {'ok' if ok else 'FAILED'}")
            passed = passed and ok
    return passed


def describe_extension() -> str:
    """The extension's file, and the torch that it was compiled for."""
    if backends._C is None:
        return "none"
    record = backends.found.record
    text = f"{backends._C.__file__}, compiled for torch {record.get('torch') or '(not recorded)'}"
    package = extension.PACKAGE
    stale = "sources" in record and extension.is_source(package)
    if stale and record["sources"] != extension.fingerprint(package.parent):
        text += f" from older sources than {package.parent / 'csrc'}"
    return text


def devices_of(backend: str) -> list[torch.device]:
    if backend == "cpu":
        return [torch.device("cpu")]
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]


def describe(device: torch.device) -> str:
    if device.type == "cpu":
        return f"{backends._C.cpu_isa()} kernels, {torch.get_num_threads()} threads"
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, compute capability {properties.major}.{properties.minor}"


def same_as_reference(
    cls: type[fusedopt.FusedOptimizer], backend: str, device: torch.device
) -> bool:
    """Whether some steps give the bits that the reference gives on the CPU."""
    # torch's matrix products, which Muon's parameters depend on, round in another way on a GPU.
    with_params = cls is not fusedopt.FusedMuon or device.type == "cpu"
    actual = run(cls, backend, device, with_params)
    expected = run(cls, "reference", torch.device("cpu"), with_params)
    return all(torch.equal(a.cpu(), b) for a, b in zip(actual, expected, strict=True))


def clips_as_reference(backend: Any, device: torch.device) -> bool:
    """Whether clipping by itself gives the bits that the reference gives on the CPU."""
    actual = clip(backend, device)
    expected = clip("reference", torch.device("cpu"))
    return all(torch.equal(a.cpu(), b) for a, b in zip(actual, expected, strict=True))


def clip(backend: Any, device: torch.device) -> list[Tensor]:
    """The norms of both fused orders, and the gradients clipped by them, as integers."""
    results = []
    for norm_type in (2.0, math.inf):
        generator = torch.Generator().manual_seed(0)
        params = []
        for dtype in DTYPES:
            for shape in SHAPES:
                grad = torch.randn(shape, generator=generator).to(device, dtype)
                params.append(torch.zeros_like(grad, requires_grad=True))
                params[-1].grad = grad
        results.append(fusedopt.clip_grad_norm_(params, 1.0, norm_type, backend=backend))
        results += [param.grad for param in params]
    return [bits(tensor) for tensor in results]


def run(cls: Any, backend: str, device: torch.device, with_params: bool = True) -> list[Tensor]:
    """Parameters, states and readings after several steps, one of them skipped, as integers."""
    generator = torch.Generator().manual_seed(0)

    def draw(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    shapes = MATRICES if cls.rule is fusedopt.FusedMuon.rule else SHAPES
    params = [draw(shape, dtype).requires_grad_() for dtype in DTYPES for shape in shapes]
    known = inspect.signature(cls).parameters
    asked = {"weight_decay": 0.1, "momentum": 0.9}
    options = {name: value for name, value in asked.items() if name in known}
    optimizer = cls(params, max_grad_norm=1.0, backend=backend, **options)
    for step in range(STEPS):
        if "cautious" in known:
            optimizer.cautious = step == STEPS - 1
        for param in params:
            param.grad = draw(tuple(param.shape), param.dtype)
        if step == 1:
            params[1].grad = torch.full_like(params[1], torch.inf)
        optimizer.step()
    states = [value for param in params for value in optimizer.state[param].values()]
    readings = [optimizer.grad_norm, optimizer.skipped_steps]
    compared = (*(params if with_params else ()), *states, *readings)
    return [bits(tensor.detach()) for tensor in compared]


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
