"""The step of every optimizer on the tensors of well-known models, against every other library."""

import pytest

from benchmarks import cases
from benchmarks.comparisons import CEILING, StepComparison
from benchmarks.peers import SIDES
from benchmarks.timing import replay_clock

SUITE = "step"
COMPARISONS = [StepComparison(case) for case in cases.step_cases()]
CONTENDERS = [*SIDES, CEILING]


@pytest.mark.benchmark(timer=replay_clock)
def test_step(entry, benchmark):
    entry.record(benchmark)
