"""Training with fewer bytes ends where float32's does, and naive bfloat16 does not."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

for library in ("sklearn", "matplotlib"):
    pytest.importorskip(library)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
low_precision = importlib.import_module("low_precision")

SEEDS, STEPS, ALLOWED = 3, 1200, 0.002


def last_losses(formats, steps):
    return [low_precision.train(formats, seed, steps).losses[-1] for seed in range(SEEDS)]


def test_the_loss_is_that_of_float32_but_for_naive_training():
    """On digits: paired seeds, the same first weights and batches."""
    losses = {name: last_losses(it, STEPS) for name, it in low_precision.WAYS.items()}
    exact = losses.pop("float32")
    for name, found in losses.items():
        difference = sum(a - b for a, b in zip(found, exact)) / SEEDS
        print(f"{name}: {difference:+.5f} beside float32's {sum(exact) / SEEDS:.5f}")
        assert (abs(difference) < ALLOWED) == (name == "24bit + 8bit")


def test_the_example_draws_a_picture(tmp_path, capsys):
    picture = tmp_path / "picture.png"
    low_precision.main(["--steps", "30", "--out", str(picture)])
    assert picture.stat().st_size > 10_000
    assert capsys.readouterr().out.count("loss") == len(low_precision.WAYS)
