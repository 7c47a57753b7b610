"""The gain of a faster step in a training run: tokens and images per second."""

import pytest

from benchmarks.peers import OURS
from benchmarks.timing import replay_clock
from benchmarks.training import TORCHS, training_comparisons

SUITE = "training"
COMPARISONS = training_comparisons()
CONTENDERS = [OURS, TORCHS]


@pytest.mark.benchmark(timer=replay_clock)
def test_training(entry, benchmark):
    entry.record(benchmark)
