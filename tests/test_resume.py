"""A run that is killed and resumed in a new process has the bits of an uninterrupted run."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys

import pytest
import resume_run
import torch
from cases import CASES, same_bits

STEPS = 8


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value
    return [t for item in items for t in tensors_in(item)] if isinstance(value, dict | list) else []


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="nothing to kill a process with")
def test_killed_and_resumed(tmp_path):
    *_, uninterrupted = resume_run.train(tmp_path / "whole.pt", STEPS, lambda: None)

    path = tmp_path / "killed.pt"
    command = [sys.executable, resume_run.__file__, str(path), str(STEPS)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "2"}
    events_per_step = len(CASES) + 1
    within_a_step = random.Random(0).randrange(2, 3 * events_per_step)
    while_saving = 2 * events_per_step
    for kill in (within_a_step, while_saving, None):
        done = subprocess.run(
            [*command, *([str(kill)] if kill else [])], env=environment, timeout=120, check=False
        )
        assert done.returncode == (-signal.SIGKILL if kill else 0)
    resumed = torch.load(path, weights_only=True)
    assert resumed["step"] == uninterrupted["step"] == STEPS
    for case, ours, expected in zip(CASES, resumed["runs"], uninterrupted["runs"], strict=True):
        pairs = list(zip(tensors_in(ours), tensors_in(expected), strict=True))
        assert len(pairs) >= 4
        assert all(same_bits(*pair) for pair in pairs), case
        assert ours["2"] == expected["2"]
