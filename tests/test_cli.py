"""`python -m fusedopt` reports what is built, and notices a kernel that is wrong."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

import fusedopt
from fusedopt import reference
from fusedopt import selfcheck as cli
from fusedopt.core import backends


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fusedopt", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_report_and_self_check():
    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"fusedopt {fusedopt.__version__}, torch {torch.__version__} ")
    assert lines[1].startswith("cpu: ")
    assert any(isa in lines[1] for isa in ("baseline", "avx2", "avx512"))
    assert [line.split() for line in lines[2:8]] == [
        ["FusedAdam", "ok"],
        ["FusedAdamW", "ok"],
        ["FusedNAdam", "ok"],
        ["FusedRMSprop", "ok"],
        ["FusedSGD", "ok"],
        ["clip_grad_norm_", "ok"],
    ]
    assert lines[8].startswith("cuda")
    reason = backends.why_missing("cuda")
    if reason is not None:
        assert lines[8] == f"cuda: can't be used: {reason}"


def test_a_backend_that_was_asked_for_has_to_be_usable(monkeypatch, capsys):
    monkeypatch.setattr(backends, "_C", None)
    assert cli.main(["--backend", "cuda"]) == 1
    assert "cuda: can't be used: the compiled extension" in capsys.readouterr().out
    assert cli.main([]) == 0  # nothing is built, and nothing is wrong


@pytest.mark.parametrize("cls", cli.CLASSES)
def test_one_wrong_bit_is_reported(monkeypatch, capsys, cls):
    update = reference.update

    def off_by_one_bit(rule, group, param, state, grad_factor):
        update(rule, group, param, state, grad_factor)
        if param.shape == (33, 41) and param.dtype == torch.float32:
            param.view(torch.int32)[-1, -1] ^= 1

    monkeypatch.setattr(reference, "update", off_by_one_bit)
    monkeypatch.setattr(cli, "CLASSES", (cls,))
    assert cli.main(["--backend", "cpu"]) == 1
    assert f"    {cls.__name__:15} FAILED" in capsys.readouterr().out.splitlines()


def test_one_wrong_bit_of_clipping_is_reported(monkeypatch, capsys):
    clip_grads = reference.clip_grads

    def off_by_one_bit(grads, max_norm, norm_type, *rest):
        result = clip_grads(grads, max_norm, norm_type, *rest)
        if norm_type == math.inf:
            grads[2].view(torch.int32)[-1, -1] ^= 1
        return result

    monkeypatch.setattr(reference, "clip_grads", off_by_one_bit)
    assert cli.main(["--backend", "cpu"]) == 1
    assert "    clip_grad_norm_ FAILED" in capsys.readouterr().out.splitlines()


def test_every_optimizer_is_checked():
    exported = {getattr(fusedopt, name) for name in fusedopt.__all__}
    optimizers = {
        cls for cls in exported if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)
    }
    assert optimizers - {fusedopt.FusedOptimizer} == set(cli.CLASSES)


def test_usage():
    help_text = run("--help").stdout
    assert help_text.startswith("usage: python -m fusedopt")
    assert "--backend {cpu,cuda}" in help_text
    assert run("--backend", "abacus").returncode == 2
