"""One measurement: all sides of a case use the same tensors, and are timed in turn."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch.nn import Parameter

import fusedopt
from benchmarks import ceiling, results, traffic
from benchmarks.cases import Case
from benchmarks.format_sides import FORMAT_SIDES
from benchmarks.jax_sides import STEPS, make_program
from benchmarks.keras_sides import BACKEND, make_keras_step
from benchmarks.memory import extra_bytes, stored_bytes
from benchmarks.peers import OURS, SIDES, Unavailable, make_step
from benchmarks.timing import Effort, Step, cache_bytes, interleaved, make_evict

CEILING = "ceiling"
CONTENDERS_OF_FORMATS = {name: side.contender for name, side in FORMAT_SIDES.items()}


@dataclass
class Outcome:
    """The results of a measurement.

    Attributes:
        samples: by side, the seconds of each round. Samples of the same round make a pair.
        skipped: by side, the reason why the side was not measured.
        bytes: by side, the bytes that a step moves, if they are known.
        columns: by side, more columns of its row.
    """

    samples: dict[str, list[float]]
    skipped: dict[str, str]
    bytes: dict[str, int] = field(default_factory=dict)
    columns: dict[str, dict[str, Any]] = field(default_factory=dict)

    def rows(self, suite: str, comparison: Comparison, threads: int) -> list[results.Row]:
        """The rows of a report, one per side."""
        return [
            {"suite": suite, **comparison.facts(), "threads": threads, "side": side,
             "bytes": self.bytes.get(side), **self.columns.get(side, {}),
             "samples_ns": results.kept(samples)}
            for side, samples in self.samples.items()
        ]  # fmt: skip


class Comparison(Protocol):
    """A task for several sides, with every number of threads or only the largest."""

    @property
    def title(self) -> str: ...

    @property
    def any_threads(self) -> bool: ...

    def facts(self) -> dict[str, Any]: ...

    def run(self, sides: list[str], device: str, effort: Effort) -> Outcome: ...


@dataclass(frozen=True)
class CaseComparison:
    """What a comparison knows from its case."""

    case: Case

    @property
    def title(self) -> str:
        return self.case.title

    @property
    def any_threads(self) -> bool:
        return self.case.any_threads

    def facts(self) -> dict[str, Any]:
        return self.case.facts()


class StepComparison(CaseComparison):
    """Compares a step of an optimizer between sides that share parameters and gradients.

    Our side comes first, the ceiling last. Each side has its own state. If the tensors don't fit
    into the cache, they are evicted from it before every step, as by a backward pass of that size.
    """

    def run(self, sides: list[str], device: str, effort: Effort) -> Outcome:
        torch.compiler.reset()  # drop code compiled for other tensors or another number of threads
        torch.manual_seed(0)
        params = make_params(self.case, device)
        outcome = Outcome({}, {})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings of other libraries
            steps = self.make_steps(sides, params, outcome)
            memory = self.case.elements * self.case.dtype.itemsize * 4
            outcome.samples = interleaved(steps, device, effort, evict_for(memory, device))
        return outcome

    def make_steps(
        self, sides: list[str], params: list[Parameter], outcome: Outcome
    ) -> dict[str, Step]:
        """The steps of all sides that can run here. Empty if our own side can't."""
        steps: dict[str, Step] = {}
        states = 0
        for side in sides:
            if side == CEILING:
                measure = self.case.mode != "plain"
                add_ceiling(steps, outcome, self.case, params[0].device.type, 1 + states, measure)
                outcome.bytes[side] = self.least_bytes(states)
                continue
            try:
                step, optimizer = make_step(side, self.case, params)
                step()
            except Unavailable as reason:
                outcome.skipped[side] = str(reason)
                if side == OURS:
                    return {}
                continue
            except Exception as error:  # the library doesn't take such tensors
                if side == OURS:
                    raise
                outcome.skipped[side] = f"failed: {error}"
                continue
            steps[side] = step
            if side == OURS:
                states = states_per_param(optimizer, params[0])
                outcome.bytes[side] = self.least_bytes(states)
            elif SIDES[side].counted:
                outcome.bytes[side] = traffic.count(step)
        return steps

    def least_bytes(self, states: int) -> int:
        """The bytes of a step that reads the gradient for a norm, and then moves each array once.

        The parameter and its states are read and written. Our step moves exactly these bytes.
        """
        passes = 2 * (1 + states) + 1 + (self.case.mode != "plain")
        return passes * self.case.elements * self.case.dtype.itemsize


class NormComparison(CaseComparison):
    """Compares the global norm of the same gradients between libraries. The ceiling reads them."""

    def run(self, sides: list[str], device: str, effort: Effort) -> Outcome:
        torch.manual_seed(0)
        params = make_params(self.case, device)
        grads = [param.grad for param in params if param.grad is not None]
        steps: dict[str, Step] = {
            OURS: lambda: fusedopt.get_total_norm(grads),
            "torch foreach": lambda: torch.nn.utils.get_total_norm(grads, foreach=True),
        }
        outcome = Outcome({}, {})
        add_ceiling(steps, outcome, self.case, device, written=0, measure=True)
        memory = self.case.elements * self.case.dtype.itemsize
        outcome.bytes = dict.fromkeys((OURS, CEILING), memory)
        steps = {side: step for side, step in steps.items() if side in sides}
        outcome.samples = interleaved(steps, device, effort, evict_for(memory, device))
        return outcome


class FormatComparison(CaseComparison):
    """Compares a step between formats. Each side has its own parameters, as their dtypes differ.

    Rows also have what a side stores for its parameters and states, and the most that it holds
    during a step, with the gradients' bytes left out: "stored" and "peak", in bytes.
    """

    def run(self, sides: list[str], device: str, effort: Effort) -> Outcome:
        torch.compiler.reset()
        outcome = Outcome({}, {})
        steps: dict[str, Step] = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings of other libraries
            for side in sides:
                try:
                    steps[side], outcome.columns[side] = self._prepare(side, device)
                except Unavailable as reason:
                    outcome.skipped[side] = str(reason)
                except Exception as error:  # the library doesn't take such tensors
                    if FORMAT_SIDES[side].is_ours:
                        raise
                    outcome.skipped[side] = f"failed: {error}"
            memory = self.case.elements * self.case.dtype.itemsize * 4
            outcome.samples = interleaved(steps, device, effort, evict_for(memory, device))
        return outcome

    def _prepare(self, side: str, device: str) -> tuple[Step, dict[str, Any]]:
        torch.manual_seed(0)
        params = make_params(replace(self.case, dtype=FORMAT_SIDES[side].dtype), device)
        step, optimizer = make_step(side, self.case, params, CONTENDERS_OF_FORMATS)
        for _ in range(2):  # makes the states, compiles
            step()
        extra, stored = extra_bytes(step, device), stored_bytes(optimizer)
        return step, {"stored": stored, "peak": None if extra is None else stored + extra}


class JaxComparison(CaseComparison):
    """Compares programs of JAX that take the same steps. A sample is the time of one step."""

    def run(self, sides: list[str], device: str, effort: Effort) -> Outcome:
        outcome = measured(self.case, sides, make_program, device, effort)
        samples = outcome.samples.items()
        outcome.samples = {side: [it / STEPS for it in times] for side, times in samples}
        return outcome


class KerasComparison(CaseComparison):
    """Compares steps of Keras's classes, on the backend that KERAS_BACKEND names."""

    def run(self, sides: list[str], device: str, effort: Effort) -> Outcome:
        outcome = measured(self.case, sides, make_keras_step, device, effort)
        outcome.columns = {side: {"backend": BACKEND} for side in outcome.samples}
        return outcome


def measured(
    case: Case,
    sides: list[str],
    make: Callable[[str, Case], Step],
    device: str,
    effort: Effort,
) -> Outcome:
    """The outcome of clipped steps of Adam, for all sides that are there."""
    outcome = Outcome({}, {}, {OURS: 32 * case.elements})
    steps: dict[str, Step] = {}
    for side in sides:
        try:
            steps[side] = make(side, case)
        except Unavailable as reason:
            outcome.skipped[side] = str(reason)
    outcome.samples = interleaved(steps, device, effort)
    return outcome


def add_ceiling(
    steps: dict[str, Step], outcome: Outcome, case: Case, device: str, written: int, measure: bool
) -> None:
    """Adds the ceiling to the steps, or to what is skipped."""
    elements = case.elements * case.dtype.itemsize // 4
    try:
        steps[CEILING] = ceiling.make_ceiling(elements, written, measure, device)
    except Unavailable as reason:
        outcome.skipped[CEILING] = str(reason)


def evict_for(memory: int, device: str) -> Step | None:
    """What evicts tensors from the last cache before each step, if they don't fit into it."""
    return make_evict(device) if memory > cache_bytes(device) else None


def make_params(case: Case, device: str) -> list[Parameter]:
    params = [Parameter(torch.randn(shape, device=device).to(case.dtype)) for shape in case.shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    return params


def states_per_param(optimizer: torch.optim.Optimizer, param: Parameter) -> int:
    """The number of tensors of the parameter's size that the optimizer keeps for it."""
    state = optimizer.state[param].values()
    return sum(isinstance(value, torch.Tensor) and value.dim() > 0 for value in state)
