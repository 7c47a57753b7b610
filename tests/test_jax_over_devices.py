"""`fusedopt.jax` over several devices: the bits of one; what would gather or differ is refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("jax", reason="jax isn't installed")

from fusedopt.core import extension

if extension.library_in(extension.PACKAGE, "jax") is None:
    pytest.skip("the custom call is not compiled", allow_module_level=True)

PROGRAM = Path(__file__).parent / "jax_over_devices.py"
REFUSALS = {
    "step": r"params\['both'\] is sharded: .* the step inside of jax.shard_map",
    "init": r"params\['both'\] is sharded",
    "params in jit": r"params\['both'\] is sharded",
    "grads in jit": r"grads\['both'\] is sharded",
    "explicit axes": r"params\['both'\] is sharded",
    "grads not added up": r"grads\['both'\] differs along 'x', 'y', and its parameter .*psum",
    "state of whole arrays": r"state.moments\['exp_avg', 'float32'\] is the same along 'x', 'y'",
    "rate by rank": "an option differs along 'x'; expected one number for all ranks",
    "check_vma": r"expected jax.shard_map\(..., check_vma=True\)",
    "some axes": "the mesh has the axes x that jax.shard_map leaves to XLA",
}


def test_steps_over_devices():
    run = subprocess.run(
        [sys.executable, str(PROGRAM)], capture_output=True, text=True, check=False, timeout=300
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["bits_of_whole_arrays"] == {"equal": True, "steps": [3, 1]}
    assert found["protocol_of_optax"] and found["copies_on_every_device"]
    text = found["compiled_text"]
    assert "all-reduce" in text and "all-gather" not in text
    assert not re.search(r"f32\[[1-9].*\bcopy(-start)?\(", text)
    for name, message in REFUSALS.items():
        assert re.search(message, found[name]), (name, found[name])
