"""After any change, a step has the reference's bits, or raises and has changed nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SANITIZED

FUZZ = Path(__file__).with_name("fuzz_step.py")


# One seed, so that a run of all tests can be repeated: fuzz_step.py alone draws another each time.
# In a process of its own: what is tested is that this one doesn't crash.
@pytest.mark.parametrize("backend", ["cpu", "emulated"])
def test_random_changes_between_steps(backend):
    variant = SANITIZED or "emulated"
    if SANITIZED and backend == "cpu":
        pytest.skip("only the emulated kernels are sanitized")
    arguments = ["--emulated", variant] if backend == "emulated" else []
    command = [sys.executable, str(FUZZ), "--mutations", "1500", "--seed", "1", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
