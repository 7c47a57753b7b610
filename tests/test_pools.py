"""A step takes threads from its caller's pool, whenever they come: the bits are always the same."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

import pytest

from fusedopt.core import backends

np: Any = pytest.importorskip("numpy")
if backends._C is None:
    pytest.skip("the kernels are not compiled", allow_module_level=True)

from fusedopt import arrays  # noqa: E402
from fusedopt.core import c_library  # noqa: E402

Task = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
Schedule = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
SIZES = [100_000, 0, 7, 60_000, 16_385]
THREADS = 3
STEPS = 3


class Pool:
    """A pool whose threads come when it pleases the test."""

    def __init__(self, run: Callable[[Callable[[], None]], None]) -> None:
        self.scheduled = 0
        self._run = run
        self._schedule = Schedule(self._take)  # kept as long as the pool

    def _take(self, _pool: int, task: int, argument: int) -> None:
        self.scheduled += 1
        self._run(lambda: Task(task)(argument))

    def lend(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Makes every step of `fusedopt.arrays` take threads from here."""
        step = c_library.Step
        c_library.load()
        address = ctypes.cast(self._schedule, ctypes.c_void_p)
        monkeypatch.setattr(c_library, "Step", lambda **its: step(**its, schedule=address))


def trained(cls: Any) -> list[Any]:
    """The parameters and states after a few clipped steps."""
    random = np.random.default_rng(0)
    params = [random.normal(size=size).astype(np.float32) for size in SIZES]
    optimizer = cls(params, lr=0.01, max_grad_norm=1.0, threads=THREADS)
    for _ in range(STEPS):
        optimizer.step([random.normal(size=size).astype(np.float32) for size in SIZES])
    states = [it for state in optimizer.state for it in state.values()]
    return [*params, *states, np.array(optimizer.grad_norm)]


def assert_same(results: list[Any], expected: list[Any]) -> None:
    assert all(map(np.array_equal, results, expected))


def in_a_thread(task: Callable[[], None]) -> None:
    threading.Thread(target=task).start()


def before_the_caller(task: Callable[[], None]) -> None:
    """Another thread finds all of the pass to do, and does it."""
    thread = threading.Thread(target=task)
    thread.start()
    thread.join()


def in_the_callers_thread(task: Callable[[], None]) -> None:
    task()


@pytest.mark.parametrize(("cls", "passes"), [(arrays.AdamW, 2), (arrays.LAMB, 3)])
@pytest.mark.parametrize("run", [in_a_thread, before_the_caller, in_the_callers_thread])
def test_threads_that_come(cls, passes, run, monkeypatch):
    expected = trained(cls)
    pool = Pool(run)
    pool.lend(monkeypatch)
    assert_same(trained(cls), expected)
    assert pool.scheduled == STEPS * passes * (THREADS - 1)


def test_threads_that_come_too_late(monkeypatch):
    """They do nothing, in whatever order they come."""
    expected = trained(arrays.AdamW)
    late: list[Callable[[], None]] = []
    Pool(late.append).lend(monkeypatch)
    results = trained(arrays.AdamW)
    for task in reversed(late):
        task()
    assert_same(results, expected)


def test_threads_that_come_in_the_next_pass(monkeypatch):
    """A pass goes on without them, and they don't disturb the next one."""
    expected = trained(arrays.AdamW)
    waiting: list[Callable[[], None]] = []

    def run(task: Callable[[], None]) -> None:
        waiting.append(task)
        if len(waiting) >= THREADS:
            waiting.pop(0)()

    Pool(run).lend(monkeypatch)
    assert_same(trained(arrays.AdamW), expected)
    for task in waiting:
        task()


def test_small_steps_ask_for_no_thread(monkeypatch):
    pool = Pool(in_the_callers_thread)
    pool.lend(monkeypatch)
    arrays.SGD([np.ones(10, np.float32)], lr=0.1, threads=THREADS).step([np.ones(10, np.float32)])
    assert pool.scheduled == 0
