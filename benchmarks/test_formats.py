"""The time and memory of AdamW's step in each format of fewer bytes, against other libraries'."""

import pytest

from benchmarks import cases
from benchmarks.comparisons import FormatComparison
from benchmarks.format_sides import FORMAT_SIDES
from benchmarks.timing import replay_clock

SUITE = "formats"
COMPARISONS = [FormatComparison(case) for case in cases.format_cases()]
CONTENDERS = [*FORMAT_SIDES]


@pytest.mark.benchmark(timer=replay_clock)
def test_format(entry, benchmark):
    entry.record(benchmark)
