"""Steps of AdamW in programs of JAX, against optax's."""

import pytest

from benchmarks import cases
from benchmarks.comparisons import JaxComparison
from benchmarks.jax_sides import JAX_SIDES
from benchmarks.timing import replay_clock

SUITE = "jax"
COMPARISONS = [JaxComparison(case) for case in cases.jax_cases()]
CONTENDERS = [*JAX_SIDES]


@pytest.mark.benchmark(timer=replay_clock)
def test_jax(entry, benchmark):
    entry.record(benchmark)
