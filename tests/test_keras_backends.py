"""Keras's backends: each in a process of its own, as Keras has one for all its life."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("keras") is None:
    pytest.skip("keras isn't installed", allow_module_level=True)
ROOT = Path(__file__).resolve().parent.parent
BACKENDS = ["jax", "tensorflow", "torch"]
OWN = os.environ.get("KERAS_BACKEND", "torch")  # of this process
SUITE = [f"tests/test_keras{it}.py" for it in ("", "_models", "_moves")]
each_backend = pytest.mark.parametrize("backend", BACKENDS)


# Keras's own test that fails with our classes: it counts the variables, and ours has readings.
KNOWN_ON_JAX = "SGDTest and test_single_step"


def python(*arguments: str, backend: str) -> str:
    """What a Python process prints. If it fails, so does the test."""
    if find_spec(backend) is None:
        pytest.skip(f"{backend} isn't installed")
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": path}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("backend", [it for it in BACKENDS if it != OWN])
def test_the_suite_passes(backend):
    """This process runs it on its own backend."""
    own = f"tests/test_keras_{backend}.py"
    suite = [*SUITE, own] if (ROOT / own).exists() else SUITE
    python("-m", "pytest", "-q", "-x", "-p", "no:xdist", *suite, backend=backend)


@each_backend
def test_kerass_own_tests_pass_with_our_classes(backend):
    chosen = f"not ({KNOWN_ON_JAX})" if backend == "jax" else ""
    names = ("adam", "adamw", "nadam", "rmsprop", "sgd")
    suites = [f"keras.src.optimizers.{name}_test" for name in names]
    options = ("-q", "-c", os.devnull, "--noconftest", "-p", "no:cacheprovider")
    options += ("-p", "peers.keras_classes", "-k", chosen, "--pyargs")
    printed = python("-m", "pytest", *options, *suites, backend=backend)
    assert int(re.search(r"(\d+) passed", printed)[1]) > 20


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
    python("-c", "import sys, fusedopt; assert 'keras' not in sys.modules", backend=OWN)
