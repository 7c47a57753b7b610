"""Times steps: all sides take turns, round by round, with the caches in the same condition."""

from __future__ import annotations

import gc
import itertools
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

Step = Callable[[], object]


@dataclass(frozen=True)
class Effort:
    """How long to measure: for `seconds`, but at least `rounds` rounds."""

    seconds: float = 4.0
    rounds: int = 15
    warm_up: int = 3


def interleaved(
    steps: Mapping[str, Step], device: str, effort: Effort, evict: Step | None = None
) -> dict[str, list[float]]:
    """The seconds of each side's step, one sample per round.

    Every round takes one step of each side, in another random order each time. So neither a slow
    moment of the machine nor the data that the previous side left in the caches favors a side.
    `evict` runs before each step and is not timed.
    """
    samples: dict[str, list[float]] = {side: [] for side in steps}
    sides, shuffle = list(steps), random.Random(0).shuffle
    if not sides:
        return samples
    for _ in range(effort.warm_up):
        for step in steps.values():
            step()
    synchronize(device)
    deadline = time.perf_counter() + effort.seconds
    with no_garbage_collection():
        for round_ in itertools.count():
            if round_ >= effort.rounds and time.perf_counter() >= deadline:
                break
            shuffle(sides)
            for side in sides:
                if evict is not None:
                    evict()
                samples[side].append(timed(steps[side], device))
    return samples


def timed(step: Step, device: str) -> float:
    """Seconds from an idle device to the end of the step.

    A CPU is timed by the host's clock. A GPU is timed between two events: the time in which it
    waits for a launch counts.
    """
    if device == "cpu":
        start = time.perf_counter_ns()
        step()
        return (time.perf_counter_ns() - start) / 1e9
    synchronize(device)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    step()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def cache_bytes(device: str) -> int:
    """The size of the last cache before memory."""
    if device != "cpu":
        return torch.cuda.get_device_properties(0).L2_cache_size
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
    except OSError:
        return 64 << 20
    return int(text.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(text[-1], 0)


def make_evict(device: str) -> Step:
    """Returns a function that reads twice the cache's size, and so evicts a step's data from it."""
    buffer = torch.ones(2 * cache_bytes(device) // 4, device=device)
    return buffer.sum


# pytest-benchmark times one test after the other, but we compare all sides within one run. So the
# samples are taken first, and pytest-benchmark gets this clock: a "step" advances it by one sample.
_now = 0.0


def replay_clock() -> float:
    return _now


def replay(samples: list[float]) -> Step:
    """Returns a function that advances `replay_clock` by the next of these samples."""
    global _now
    _now = 0.0
    rest = iter(samples)

    def step() -> None:
        global _now
        _now += next(rest)

    return step
