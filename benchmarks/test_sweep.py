"""The time of a step against the number of elements, and against the number of tensors."""

import pytest

from benchmarks import cases
from benchmarks.comparisons import CEILING, StepComparison
from benchmarks.peers import OURS
from benchmarks.timing import replay_clock

SUITE = "sweep"
COMPARISONS = [StepComparison(case) for case in [*cases.size_cases(), *cases.count_cases()]]
CONTENDERS = [OURS, "torch for-loop", "torch foreach", "torch fused", CEILING]


@pytest.mark.benchmark(timer=replay_clock)
def test_sweep(entry, benchmark):
    entry.record(benchmark)
