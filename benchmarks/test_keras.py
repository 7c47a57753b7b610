"""Steps of AdamW in Keras, on the backend that KERAS_BACKEND names, against Keras's own."""

import pytest

from benchmarks import cases
from benchmarks.comparisons import KerasComparison
from benchmarks.keras_sides import BACKEND, KERAS_SIDES
from benchmarks.timing import replay_clock

SUITE = f"keras_{BACKEND}"
COMPARISONS = [KerasComparison(case) for case in cases.jax_cases()]
CONTENDERS = [*KERAS_SIDES]


@pytest.mark.benchmark(timer=replay_clock)
def test_keras(entry, benchmark):
    entry.record(benchmark)
