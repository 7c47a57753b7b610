"""The time of the gradients' global norm, against torch's and against a loop that reads them."""

import pytest

from benchmarks import cases
from benchmarks.comparisons import CEILING, NormComparison
from benchmarks.peers import OURS
from benchmarks.timing import replay_clock

SUITE = "norm"
COMPARISONS = [NormComparison(case) for case in cases.norm_cases()]
CONTENDERS = [OURS, "torch foreach", CEILING]


@pytest.mark.benchmark(timer=replay_clock)
def test_norm(entry, benchmark):
    entry.record(benchmark)
