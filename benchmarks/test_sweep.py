"""How the time of a step grows with the elements, and with the tensors that hold them."""

import pytest

from benchmarks import cases
from benchmarks.contests import CEILING, StepContest
from benchmarks.peers import OURS
from benchmarks.timing import replay_clock

SUITE = "sweep"
CONTESTS = [StepContest(case) for case in [*cases.size_cases(), *cases.count_cases()]]
CONTEST_SIDES = [OURS, "torch for-loop", "torch foreach", "torch fused", CEILING]


@pytest.mark.benchmark(timer=replay_clock)
def test_sweep(entry, benchmark):
    entry.record(benchmark)
