"""The cost of a step in counts that noise can't change. A step that does more fails here.

If a change is worth a higher cost, run `pytest tests/test_guard.py -rP`, which shows the counts,
and put the new counts, with the stated margins, into the constants below.
"""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SANITIZED
from torch.torch_version import TorchVersion

import fusedopt
from fusedopt.core import backends

GUARD = Path(__file__).with_name("guard")

# Counted: 3 (pybind11's list of arguments, the list of passes, libgomp's team of threads). Where
# the GIL is released, 4 more: the list of what is to be kept alive doubles its size as it grows.
# With torch 2.11 and its pybind11 one more.
MAX_ALLOCATIONS = 3 if TorchVersion(torch.__version__) >= "2.13" else 4
MAX_ALLOCATIONS_WITHOUT_GIL = MAX_ALLOCATIONS + 4

# Counted: 1, norm and update together.
MAX_REGIONS = 1

# Counted, without torch's wrapper of step(): 15 functions of Python's and C's, whatever the number
# of tensors. Python versions differ by a few, and an attribute more is no harm.
MAX_CALLS = 25

# Counted with AVX2, clipped and not: 1,750 instructions for each tensor of 64 and 56,000 for the
# rest of a step. Python 3.14 may take more: nobody has counted there since the plan is told of
# changed dicts.
MAX_INSTRUCTIONS_PER_TENSOR = 1_800 if sys.version_info < (3, 14) else 2_300
MAX_INSTRUCTIONS_BESIDE = 70_000

# Counted with AVX2 in a clipped step of one tensor, at most: 11.7, 19.7, 25.9 and 46.1; up to a
# quarter more is allowed. A loop that the compiler makes no vectors of takes several times as many.
MAX_INSTRUCTIONS_PER_ELEMENT = {"float32": 13, "float64": 22, "bfloat16": 32, "float16": 58}


def build(source: Path, folder: Path) -> Path:
    compiler = os.environ.get("CC", "cc").split()
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"no C compiler ({compiler[0]})")
    output = folder / f"{source.stem}.so"
    command = [*compiler, "-O2", "-shared", "-fPIC", str(source), "-o", str(output), "-ldl"]
    subprocess.run(command, check=True)
    return output


def probe(*command: str | Path, **env: str) -> dict:
    """Runs probe.py; returns what it prints."""
    environment = {**os.environ, "PYTHONHASHSEED": "0", **env}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return json.loads(run.stdout.splitlines()[-1])


Counts = dict[int, tuple[int, ...]]  # by the number of steps


def per_step(counts: Counts, index: int) -> float:
    """The difference between twice the steps and the steps, in counts per step."""
    few, many = sorted(counts)
    return (counts[many][index] - counts[few][index]) / (many - few)


# One test each for what is counted in one process: xdist would start it once per worker.
def test_allocations_and_parallel_regions(tmp_path):
    if SANITIZED:
        pytest.skip("the sanitizer's heap and this counter can't be preloaded both")
    shim = build(GUARD / "counts.c", tmp_path)
    found = probe(sys.executable, GUARD / "probe.py", "counts", shim,
                  LD_PRELOAD=str(shim), OMP_NUM_THREADS="2")  # fmt: skip
    by_what: dict[tuple, Counts] = {}
    for what, steps, counts in found["result"]:
        print(what, f"{steps} steps: allocations, regions:", *counts)
        by_what.setdefault(tuple(what), {})[steps] = counts
    for (_, numel, _), counts in by_what.items():
        releases_gil = numel > 1_000_000
        limit = MAX_ALLOCATIONS_WITHOUT_GIL if releases_gil else MAX_ALLOCATIONS
        assert 0 < per_step(counts, 0) <= limit
        assert 0 < per_step(counts, 1) <= MAX_REGIONS


def steady(tensors: int, clip: bool) -> fusedopt.FusedAdamW:
    """An optimizer that has taken some steps."""
    params = [torch.nn.Parameter(torch.randn(4)) for _ in range(tensors)]
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer = fusedopt.FusedAdamW(params, max_grad_norm=1.0 if clip else None)
    for _ in range(3):
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("clip", [False, True])
def test_steps_leave_no_objects_behind(clip):
    optimizer = steady(10, clip)
    gc.collect()
    steps = 2000
    before = sys.getallocatedblocks()
    for _ in range(steps):
        optimizer.step()
    gc.collect()
    left = sys.getallocatedblocks() - before
    print(f"{left} objects after {steps} steps")
    assert left < steps / 4  # Python's lists of free objects fill up once, with some 200


def calls_of_a_step(tensors: int, clip: bool) -> int:
    optimizer = steady(tensors, clip)
    calls = []

    def note(frame, event, argument):
        if event in ("call", "c_call"):
            calls.append(getattr(argument, "__qualname__", frame.f_code.co_name))

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        optimizer._fused_step()
    finally:
        sys.setprofile(before)
    calls.remove("setprofile")
    print(f"{tensors} tensors: {len(calls)} calls: {', '.join(calls)}")
    return len(calls)


@pytest.mark.parametrize("clip", [False, True])
def test_python_does_nothing_for_a_tensor(clip):
    few, many = calls_of_a_step(1, clip), calls_of_a_step(1000, clip)
    assert few == many
    assert 0 < many <= MAX_CALLS


def instructions(tmp_path: Path) -> list[tuple[list, int, int]]:
    """What probe.py has run under callgrind: what, how many steps, and all their instructions."""
    if shutil.which("valgrind") is None:
        pytest.skip("valgrind is not installed: apt-get install valgrind")
    assert backends._C is not None
    if backends._C.cpu_isa() == "baseline":
        pytest.skip("the limits are those of AVX2, and this processor has none")
    shim = build(GUARD / "instructions.c", tmp_path)
    callgrind = ["valgrind", "-q", "--tool=callgrind", "--instr-atstart=no",
                 f"--callgrind-out-file={tmp_path / 'counts'}"]  # fmt: skip
    found = probe(*callgrind, sys.executable, GUARD / "probe.py", "instructions", shim,
                  OMP_NUM_THREADS="1", FUSEDOPT_ISA="avx2")  # fmt: skip
    assert found["isa"] == "avx2"  # valgrind itself hides AVX-512
    counted = []
    for index, (what, steps) in enumerate(found["result"]):
        # Two files each: what came before the steps, and the steps.
        text = (tmp_path / f"counts.{2 * index + 2}").read_text()
        total = re.search(r"^totals: (\d+)", text, re.MULTILINE)
        assert total is not None
        counted.append((what, steps, int(total[1])))
    return counted


def test_instructions(tmp_path):
    """Of tensors, of the rest of a step, and of elements. Most of the time is valgrind's start."""
    counted = instructions(tmp_path)
    of_steps = [it for it in counted if len(it[0]) == 3]
    check_steps(of_steps)
    check_elements(counted[len(of_steps) :])


def check_elements(counted: list[tuple[list, int, int]]) -> None:
    """No loop over elements is left without vectors."""
    too_many = []
    for (*rule, dtype, grad_dtype, numel, telemetry), _, total in counted:
        loop = f"{rule}, {dtype}, gradient {grad_dtype}, telemetry={telemetry}"
        print(f"{loop}: {total / numel:.1f} instructions per element")
        more = 1.5 if "cautious" in rule[1] else 1  # in two passes
        if not 0 < total / numel <= more * MAX_INSTRUCTIONS_PER_ELEMENT[dtype]:
            too_many.append(loop)
    assert len(counted) > 100 and not too_many


def check_steps(counted: list[tuple[list, int, int]]) -> None:
    by_what: dict[tuple[int, bool], Counts] = {}
    for (tensors, _, clip), steps, total in counted:
        by_what.setdefault((tensors, clip), {})[steps] = (total,)
    for clip in (False, True):
        few, many = (per_step(by_what[tensors, clip], 0) for tensors in (10, 1000))
        per_tensor = (many - few) / 990
        beside = few - 10 * per_tensor
        print(f"clip={clip}: {per_tensor:.0f} instructions per tensor, {beside:.0f} beside")
        assert 0 < per_tensor <= MAX_INSTRUCTIONS_PER_TENSOR
        assert 0 < beside <= MAX_INSTRUCTIONS_BESIDE
