"""Averages in fewer bytes stay those of float32: tiny gradients, and rows that are seldom hit.

`python -m benchmarks.quality` trains whole models; tests/test_formats.py lets a variance fall.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import fusedopt

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import quality

ROWS, WIDTH, STEPS = 96, 64, 2000
FORMATS = {
    "bfloat16": {"state_dtype": torch.bfloat16},
    "8bit": {"state_dtype": "8bit"},
    "bfloat16, nearest": {"state_dtype": torch.bfloat16, "rounding": "nearest"},
}


class Beside(NamedTuple):
    """Ratios to a float32 optimizer with the same gradients, after the last step."""

    length: float  # of the update
    root: float  # the median of sqrt(exp_avg_sq)


def beside_float32(formats, grad_of_step):
    found = []
    for options in (formats, {}):
        param = torch.zeros(ROWS, WIDTH, requires_grad=True)
        optimizer = fusedopt.FusedAdam([param], **options)
        generator = torch.Generator().manual_seed(0)
        for step in range(STEPS):
            param.grad = grad_of_step(step, generator)
            if step == STEPS - 1:
                param.data.zero_()
            optimizer.step()
        found.append((float(param.detach().norm()), quality.median_root(optimizer)))
    (length, root), (exact_length, exact_root) = found
    return Beside(length / exact_length, root / exact_root)


def noise(generator):
    return torch.randn(ROWS, WIDTH, generator=generator)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("size", [1e-6, 1e-8])
def test_tiny_gradients(name, size):
    """Their squares, of 1e-16 and less, are float32 numbers; eps stands above them."""
    ratios = beside_float32(FORMATS[name], lambda step, generator: size * noise(generator))
    print(name, size, ratios)
    is_near = max(abs(it - 1) for it in ratios) < 0.01
    assert is_near == (name != "bfloat16, nearest")


@pytest.mark.parametrize("name", FORMATS)
def test_rows_that_are_hit_in_two_steps_of_a_hundred(name):
    """As those of an embedding. Between two hits the averages of a row only decay."""

    def grad_of_step(step, generator):
        is_hit = torch.rand(ROWS, 1, generator=generator) < 0.02
        return torch.where(is_hit, noise(generator), 0)

    ratios = beside_float32(FORMATS[name], grad_of_step)
    print(name, ratios)
    is_near = max(abs(it - 1) for it in ratios) < 0.01
    assert is_near == (name != "bfloat16, nearest")


# --- the benchmark of whole models


def runs_of(*losses, length=2.0, root=0.5):
    return [quality.Run(loss, [length, length], [root]) for loss in losses]


@pytest.mark.parametrize(
    ("losses", "changes", "passes"),
    [
        ((1.0005, 0.9995, 1.0), {}, True),
        ((1.0015, 1.0016, 1.0015), {}, False),  # many standard errors
        ((1.03, 0.99, 1.0), {}, False),
        ((1.0005, 0.9995, 1.0), {"length": 2.03}, False),
        ((1.0005, 0.9995, 1.0), {"root": 0.494}, False),
    ],
)
def test_what_passes(losses, changes, passes):
    base = runs_of(1.0, 1.0, 1.0)
    found = quality.verdict(quality.TASKS[0], "x", runs_of(*losses, **changes), base)
    assert found.passes == passes
    assert math.isclose(found.loss, sum(losses) / 3 - 1, abs_tol=1e-12)
    assert math.isclose(found.length, changes.get("length", 2.0) / 2)


def test_the_benchmark_prints_and_saves(tmp_path, capsys, monkeypatch):
    """Its motions, with few steps."""
    pytest.importorskip("sklearn")
    monkeypatch.setattr(quality, "TASKS", [replace(it, judged=256) for it in quality.TASKS])
    quality.main(["--seeds", "2", "--steps", "12", "--save", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * len(quality.FORMATS) + 1
    (path,) = tmp_path.glob("quality_cpu_*.json")
    rows = json.loads(path.read_text())["rows"]
    assert [row["format"] for row in rows] == 2 * [*quality.FORMATS][1:]
    assert all(0.5 < row["length"] < 2 for row in rows if row["format"] != "naive bfloat16")
