"""The emulator itself, and what only it can count: kernel launches."""

from __future__ import annotations

import ctypes
import math
import os
import shlex
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
from cases import CLASSES, DTYPES, make_params, set_grads
from conftest import emulated

import fusedopt
from fusedopt import backends

EMULATOR = Path(__file__).parent / "emulator"
SANITIZERS = ["-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


@pytest.mark.parametrize("flags", [["-O2"], ["-O1", *SANITIZERS]], ids=["plain", "sanitized"])
def test_selftest(tmp_path, flags):
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    program = tmp_path / "selftest"
    source = EMULATOR / "selftest.cpp"
    command = [*compiler, "-std=c++20", "-pthread", *flags, f"-I{EMULATOR}", source, "-o", program]
    subprocess.run(command, check=True)
    clean = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run([program], env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "ok"


@pytest.fixture
def launches(monkeypatch):
    """Counts the kernels that a call launches."""
    monkeypatch.setattr(backends, "_C", emulated())
    counter = ctypes.CDLL(emulated().__file__).fusedopt_emulator_launches
    counter.restype = ctypes.c_ulonglong

    def count(call) -> int:
        before = counter()
        call()
        return counter() - before

    return count


def optimizer_of(case, tensors, **kwargs):
    """On tensors of all dtypes in turn, in up to two groups with options of their own."""
    params = [make_params([(33,)], DTYPES[i % 4], seed=i)[0] for i in range(tensors)]
    for param in params:
        set_grads([param], seed=0)
    groups = [{"params": params[::2], "lr": 0.5}]
    if tensors > 1:
        groups.append({"params": params[1::2], "weight_decay": 0.3})
    return case.cls(groups, backend="cuda", **case.kwargs, **kwargs)


@pytest.mark.parametrize("tensors", [1, 3, 400])
@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_a_step_launches_two_kernels_however_many_tensors(launches, case, tensors):
    """And before the first step one that carries the tables."""
    for kwargs in ({"max_grad_norm": 1.0}, {"nonfinite": "skip"}):
        optimizer = optimizer_of(case, tensors, **kwargs)
        assert [launches(optimizer.step) for _ in range(3)] == [3, 2, 2]


@pytest.mark.parametrize("tensors", [1, 3, 400])
@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_one_kernel_where_nothing_depends_on_the_norm(launches, case, tensors):
    optimizer = optimizer_of(case, tensors)
    assert [launches(optimizer.step) for _ in range(3)] == [2, 1, 1]


def test_a_skipped_step_launches_no_more(launches):
    optimizer = optimizer_of(CLASSES[0], 3, max_grad_norm=1.0)
    optimizer.step()
    optimizer.param_groups[0]["params"][0].grad.fill_(torch.inf)
    assert launches(optimizer.step) == 2
    assert optimizer.step_skipped


@pytest.mark.parametrize(("tensors", "uploads"), [(1, 1), (400, 1), (1000, 3)])
def test_clipping_launches_two_kernels_and_those_that_carry_its_tables(launches, tensors, uploads):
    """72 bytes per small tensor, 32 KB per launch."""
    params = make_params([(33,)] * tensors)
    set_grads(params, seed=0)
    for norm_type in (2.0, math.inf):
        call = partial(fusedopt.clip_grad_norm_, params, 1.0, norm_type, backend="cuda")
        assert [launches(call) for _ in range(2)] == [2 + uploads] * 2
