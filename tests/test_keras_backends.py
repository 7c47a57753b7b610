"""Keras's backends: each in a process of its own, as Keras has one for all its life."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("keras", reason="keras isn't installed")
ROOT = Path(__file__).resolve().parent.parent
BACKENDS = ["jax", "tensorflow", "torch"]
SUITE = ["tests/test_keras.py", "tests/test_keras_models.py"]
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def python(*arguments: str, backend: str) -> str:
    """What a Python process prints. If it fails, so does the test."""
    if find_spec(backend) is None:
        pytest.skip(f"{backend} isn't installed")
    environment = {**os.environ, "KERAS_BACKEND": backend}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("backend", [it for it in BACKENDS if it != "torch"])
def test_the_suite_passes(backend):
    """This process runs it on torch."""
    own = f"tests/test_keras_{backend}.py"
    suite = [*SUITE, own] if (ROOT / own).exists() else SUITE
    python("-m", "pytest", "-q", "-x", "-p", "no:xdist", *suite, backend=backend)


@each_backend
def test_the_example_learns(backend):
    printed = python("examples/keras_digits.py", backend=backend)
    assert "3 bad batches skipped" in printed
    assert float(printed.split()[-1].removesuffix("%")) > 90


def test_another_backend_is_refused_by_name():
    script = "try: import fusedopt.keras\nexcept ImportError as error: print(error)"
    environment = {**os.environ, "KERAS_BACKEND": "numpy"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.startswith("KERAS_BACKEND is numpy; fusedopt.keras works on jax, ")


def test_fusedopt_alone_does_not_import_keras():
    python("-c", "import sys, fusedopt; assert 'keras' not in sys.modules", backend="torch")
