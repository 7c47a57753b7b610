"""The step of every optimizer, in the cases that a reader may recognize, against every peer."""

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
