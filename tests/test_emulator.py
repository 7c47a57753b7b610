"""The emulator itself, and what only it can count: kernel launches and the bytes they move."""

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
from fusedopt.core import backends

EMULATOR = Path(__file__).parent / "emulator"
SANITIZERS = ["-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
COMPILER = shlex.split(os.environ.get("CXX", "c++"))
CLEAN = {
    name: value for name, value in os.environ.items() if name not in ("LD_PRELOAD", "TSAN_OPTIONS")
}


def compiled(source: Path, folder: Path, *flags: str) -> Path:
    program = folder / source.stem
    command = [*COMPILER, "-std=c++20", "-pthread", *flags, f"-I{EMULATOR}", source, "-o", program]
    subprocess.run(command, check=True)
    return program


@pytest.mark.parametrize("flags", [["-O2"], ["-O1", *SANITIZERS]], ids=["plain", "sanitized"])
def test_selftest(tmp_path, flags):
    program = compiled(EMULATOR / "selftest.cpp", tmp_path, *flags)
    done = subprocess.run([program], env=CLEAN, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "ok"


def test_races_are_found(tmp_path):
    """What a program under ThreadSanitizer exits with, 66, tells whether it has seen one.

    From GCC 13 on its runtime tells 255 threads apart, fewer than two blocks have.
    """
    version = subprocess.run([*COMPILER, "-dumpversion"], capture_output=True, text=True).stdout
    expected = {"ok": 0, "race": 66, "race between blocks": 66}
    if int(version.split(".")[0]) >= 13:
        del expected["race between blocks"]
    program = compiled(EMULATOR / "racetest.cpp", tmp_path, "-O1", "-g1", "-fsanitize=thread")
    names = subprocess.run([program], env=CLEAN, capture_output=True, text=True)
    if "unexpected memory mapping" in names.stderr:
        pytest.skip("ThreadSanitizer finds no room among randomized addresses: setarch -R pytest")
    assert names.returncode == 0, names.stderr
    kinds = set()
    for name in names.stdout.splitlines():
        kind = name.partition(":")[0]
        if kind not in expected:
            continue
        kinds.add(kind)
        done = subprocess.run([program, name], env=CLEAN, capture_output=True, text=True)
        assert done.returncode == expected[kind], f"{name}\n{done.stderr}"
        assert ("data race" in done.stderr) == (expected[kind] != 0), name
    assert kinds == set(expected)


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


@pytest.fixture
def traffic(launches):
    """Bytes (loaded, stored) of the tensors, for each kernel that a call launches."""
    traffic_of = ctypes.CDLL(emulated().__file__).fusedopt_emulator_traffic
    total = ctypes.CDLL(emulated().__file__).fusedopt_emulator_launches
    total.restype = ctypes.c_ulonglong

    def of(call) -> list[tuple[int, int]]:
        first = total()
        result = []
        for launch in range(first, first + launches(call)):
            moved = (ctypes.c_ulonglong * 2)()
            traffic_of(ctypes.c_ulonglong(launch), moved)
            result.append((moved[0], moved[1]))
        return result

    return of


def optimizer_of(case, tensors, **kwargs):
    """On tensors of all dtypes in turn, in up to two groups with options of their own."""
    params = [make_params([(33,)], DTYPES[i % 4], seed=i)[0] for i in range(tensors)]
    for param in params:
        set_grads([param], seed=0)
    groups = [{"params": params[::2], "lr": 0.5}]
    if tensors > 1:
        groups.append({"params": params[1::2], "weight_decay": 0.3})
    return case.cls(groups, backend="cuda", **case.kwargs, **kwargs)


@pytest.mark.parametrize("tensors", [1, 3, 300])
@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_a_step_launches_two_kernels_however_many_tensors(launches, case, tensors):
    """Before the first step, one more kernel carries the tables. A trust ratio takes one more."""
    more = case.cls.rule.trust is not None
    for kwargs in ({"max_grad_norm": 1.0}, {"nonfinite": "skip"}):
        optimizer = optimizer_of(case, tensors, **kwargs)
        assert [launches(optimizer.step) for _ in range(3)] == [3 + more, 2 + more, 2 + more]


@pytest.mark.parametrize("tensors", [1, 3, 300])
@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_one_kernel_where_nothing_depends_on_the_norm(launches, case, tensors):
    more = case.cls.rule.trust is not None
    optimizer = optimizer_of(case, tensors)
    assert [launches(optimizer.step) for _ in range(3)] == [2 + more, 1 + more, 1 + more]


def test_telemetry_and_an_adaptive_limit_launch_no_more(launches):
    for limits, expected in (
        ({"max_grad_norm": 1.0}, [3, 2, 2]),
        ({"max_grad_norm": fusedopt.clip.Percentile(window=3, warmup=1)}, [3, 2, 2]),
        ({"max_grad_norm": fusedopt.clip.PerTensor(warmup=1)}, [3, 2, 2]),
        ({"max_grad_norm": fusedopt.clip.Unit()}, [3, 2, 2]),
        ({}, [2, 1, 1]),
    ):
        optimizer = optimizer_of(CLASSES[0], 3, telemetry=4, **limits)
        assert [launches(optimizer.step) for _ in range(3)] == expected


def test_a_skipped_step_launches_no_more(launches):
    optimizer = optimizer_of(CLASSES[0], 3, max_grad_norm=1.0)
    optimizer.step()
    optimizer.param_groups[0]["params"][0].grad.fill_(torch.inf)
    assert launches(optimizer.step) == 2
    assert optimizer.step_skipped


@pytest.mark.parametrize(("tensors", "uploads"), [(1, 1), (400, 1), (1000, 2)])
def test_clipping_launches_two_kernels_and_those_that_carry_its_tables(launches, tensors, uploads):
    """48 bytes per small tensor, 32 KB per launch."""
    params = make_params([(33,)] * tensors)
    set_grads(params, seed=0)
    for norm_type in (2.0, math.inf):
        call = partial(fusedopt.clip_grad_norm_, params, 1.0, norm_type, backend="cuda")
        assert [launches(call) for _ in range(2)] == [2 + uploads] * 2


ROWS = [(16384,), (4, 2048), (40960,)]  # no edges: 16 KiB are a whole number of what a block takes


def filled(case, dtype, shapes=ROWS, **kwargs):
    params = make_params(shapes, dtype)
    set_grads(params, seed=0)
    optimizer = case.cls(params, backend="cuda", **case.kwargs, **kwargs)
    optimizer.step()  # which carries the tables to the device
    return optimizer, sum(p.numel() for p in params), params[0].element_size()


def arrays_of_updates(rule, group):
    """How many arrays each pass after the norm reads and writes."""
    updated = 1 + len(rule.states(group))
    if rule.trust is None:
        return [(1 + updated, updated)]
    early = len(rule.trust.states)  # the pass after reads them, and no gradient
    first = 1 + rule.trust.reads_param + early + len(rule.trust.reads)
    return [(first, early), (updated + (early == 0), updated - early)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_bytes_of_a_step(traffic, case, dtype):
    """Each gradient is read once per pass; each updated array is read once and written once.

    With a trust ratio, some arrays are read twice.
    """
    optimizer, count, size = filled(case, dtype, max_grad_norm=1.0)
    arrays = arrays_of_updates(case.cls.rule, optimizer.param_groups[0])
    norm, *updates = traffic(optimizer.step)
    assert norm == (size * count, 0)
    assert updates == [tuple(it * size * count for it in moved) for moved in arrays]

    optimizer, count, size = filled(case, dtype)
    assert traffic(optimizer.step) == updates


def test_bytes_for_each_float32_with_a_trust_ratio(traffic):
    """And 4 more with clipping."""
    cases = {case.cls.__name__: case for case in CLASSES}
    expected_of = {"FusedLAMB": 40, "FusedStableAdamW": 36, "FusedLARS": 28}
    for cls, expected in (
        expected_of | {"FusedCautiousAdamW": 36, "FusedCautiousLion": 28}
    ).items():
        for limit, more in ((None, 0), (1.0, 4)):
            optimizer, count, _ = filled(cases[cls], torch.float32, max_grad_norm=limit)
            assert sum(map(sum, traffic(optimizer.step))) == (expected + more) * count


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_of_telemetry(traffic, dtype):
    """The parameter is loaded again before it is stored, from the cache. A gradient is not, but
    that of a chunk with inf or nan in it: once for its sum in float64, and once to count them."""
    options = {"telemetry": 4, "nonfinite": "propagate"}
    for limits in ({"max_grad_norm": 1.0}, {}):
        optimizer, count, size = filled(CLASSES[0], dtype, **options, **limits)
        *norm, update = traffic(optimizer.step)
        assert norm == ([(size * count, 0)] if limits else [])
        assert update == (5 * size * count, 3 * size * count)
        optimizer.param_groups[0]["params"][-1].grad[7] = torch.inf
        again = (1 if dtype == torch.float64 else 2) * size * 16384
        *norm, update = traffic(optimizer.step)
        assert norm == ([(size * count + again, 0)] if limits else [])
        assert update == (5 * size * count + (0 if limits else again), 3 * size * count)


def test_bytes_of_clips_by_tensor_and_by_unit(traffic):
    """A limit of rows reads parameters too. Gradients are loaded again, from the cache."""
    update = (4 * 4, 3 * 4)
    for limit, measured in ((fusedopt.clip.PerTensor(), 4), (fusedopt.clip.Unit(), 3 * 4)):
        optimizer, count, _ = filled(CLASSES[0], torch.float32, max_grad_norm=limit)
        found = [(loaded / count, stored / count) for loaded, stored in traffic(optimizer.step)]
        assert found == [(measured, 0), update]


def test_adam_moves_32_bytes_for_each_float32(traffic):
    """It moves 28 without clipping. torch's clip_grad_norm_ and fused Adam move 40."""
    optimizer, count, _ = filled(CLASSES[0], torch.float32, max_grad_norm=1.0)
    assert sum(map(sum, traffic(optimizer.step))) == 32 * count
    optimizer, count, _ = filled(CLASSES[0], torch.float32)
    assert sum(map(sum, traffic(optimizer.step))) == 28 * count


FORMAT_BYTES = [  # per element: of a step, and of a clipped one
    (torch.float32, {"state_dtype": torch.bfloat16}, 20, 24),
    (torch.bfloat16, {"state_dtype": torch.float32}, 22, 24),
    (torch.bfloat16, {"rounding": "stochastic"}, 14, 16),
    (torch.bfloat16, {"master_weights": "exact"}, 18, 20),
    (torch.bfloat16, {"master_weights": "exact", "state_dtype": torch.float32}, 26, 28),
    (torch.float16, {"master_weights": "exact", "state_dtype": torch.bfloat16}, 18, 20),
    (torch.bfloat16, {"master_weights": "24bit"}, 16, 18),
    (torch.bfloat16, {"master_weights": "24bit", "state_dtype": "8bit"}, 12.25, 14.25),
    (torch.bfloat16, {"rounding": "stochastic", "state_dtype": "8bit"}, 10.25, 12.25),
    (torch.float32, {"state_dtype": "8bit"}, 16.25, 20.25),
    (torch.float16, {"master_weights": "24bit", "state_dtype": torch.float32}, 24, 26),
]


@pytest.mark.parametrize(("dtype", "formats", "step", "clipped"), FORMAT_BYTES)
def test_bytes_of_formats(traffic, dtype, formats, step, clipped):
    """docs/precision.md has them."""
    for limit, expected in ((None, step), (1.0, clipped)):
        optimizer, count, _ = filled(CLASSES[0], dtype, max_grad_norm=limit, **formats)
        assert sum(map(sum, traffic(optimizer.step))) == expected * count


def test_a_skipped_step_only_measures(traffic):
    optimizer, count, size = filled(CLASSES[0], torch.float32, max_grad_norm=1.0)
    optimizer.param_groups[0]["params"][-1].grad[7] = torch.nan
    again = size * 16384  # the chunk with nan is measured again in float64
    assert traffic(optimizer.step) == [(size * count + again, 0), (0, 0)]


@pytest.mark.parametrize("start", [0, 1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_at_edges_and_of_unaligned_arrays(traffic, dtype, start):
    """Clipped, the same. Else gradients outside of whole rows are read again, from the cache."""
    case, size, count = CLASSES[0], dtype.itemsize, 33333
    param = torch.nn.Parameter(torch.zeros(start + count, dtype=dtype)[start:])
    param.grad = torch.ones(count, dtype=dtype)
    optimizer = case.cls([param], backend="cuda", max_grad_norm=1.0)
    optimizer.step()
    arrays = size * count
    assert traffic(optimizer.step) == [(arrays, 0), (4 * arrays, 3 * arrays)]

    optimizer = case.cls([param], backend="cuda")
    optimizer.step()
    ((loaded, stored),) = traffic(optimizer.step)
    assert stored == 3 * arrays
    outside = count % 16384 if start == 0 else count
    assert 4 * arrays < loaded <= 4 * arrays + size * outside


def test_clipping_reads_twice_and_writes_once(traffic):
    """And writes nothing where the factor is 1. The second pass has two names for a gradient: each
    is loaded, one of them from the cache."""
    params = make_params(ROWS)
    set_grads(params, seed=0)
    arrays = sum(p.numel() * p.element_size() for p in params)
    clip = partial(fusedopt.clip_grad_norm_, params, backend="cuda")
    assert traffic(partial(clip, 1e9))[-2:] == [(arrays, 0), (0, 0)]
    assert traffic(partial(clip, 1.0))[-2:] == [(arrays, 0), (2 * arrays, arrays)]
