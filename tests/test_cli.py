"""`python -m fusedopt` reports what is built, and notices a kernel that is wrong."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fusedopt
from fusedopt import front_ends, reference, self_check
from fusedopt.core import backends
from fusedopt.core.extension import Found


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fusedopt", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def words(text: str) -> list[list[str]]:
    """Of each line."""
    return [line.split() for line in text.splitlines()]


def test_report_and_self_check():
    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"fusedopt {fusedopt.__version__}, torch {torch.__version__} ")
    assert lines[1] == f"Python files: {Path(fusedopt.__file__).parent}"
    for name in ("arrays", "jax", "keras"):
        assert lines.pop(2).startswith(f"fusedopt.{name}: ")
    assert lines[2].startswith(f"compiled extension: {backends._C.__file__}, compiled for torch ")
    assert lines[3].startswith("cpu: ")
    assert any(isa in lines[3] for isa in ("baseline", "avx2", "avx512"))
    checked = [*(cls.__name__ for cls in self_check.CLASSES), "clip_grad_norm_"]
    cuda = 4 + len(checked)
    assert [line.split() for line in lines[4:cuda]] == [[name, "ok"] for name in checked]
    assert lines[cuda].startswith("cuda")
    reason = backends.why_missing("cuda")
    if reason is not None:
        assert lines[cuda:] == [f"cuda: can't be used: {reason}", "all checks passed"]


@pytest.mark.parametrize("arguments", [[], ["--backend", "cpu"], ["--backend", "cuda"]], ids=str)
def test_it_fails_where_nothing_is_compiled(monkeypatch, capsys, arguments):
    monkeypatch.setattr(backends, "_C", None)
    monkeypatch.setattr(backends, "found", Found(None, "there was no compiler", False, {}))
    assert self_check.self_check(arguments) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "NOT COMPILED: there was no compiler" in lines
    assert not [line for line in lines if line.endswith("ok")]


@pytest.mark.parametrize(("gpu", "arguments", "status"), [(0, [], 0), (1, [], 1), (0, ["cuda"], 1)])
def test_missing_cuda_kernels_fail_where_there_is_a_gpu(
    monkeypatch, capsys, gpu, arguments, status
):
    why_missing = backends.why_missing
    monkeypatch.setattr(self_check, "CLASSES", ())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpu))
    monkeypatch.setattr(
        backends, "why_missing", lambda name: why_missing(name) if name == "cpu" else "no nvcc"
    )
    assert self_check.self_check([f"--backend={name}" for name in arguments]) == status
    lines = capsys.readouterr().out.splitlines()
    assert "cuda: can't be used: no nvcc" in lines
    assert ("all checks passed" in lines) == (status == 0)


@pytest.mark.parametrize("cls", self_check.CLASSES)
def test_one_wrong_bit_is_reported(monkeypatch, capsys, cls):
    update = reference.update

    def off_by_one_bit(rule, group, param, *rest):
        update(rule, group, param, *rest)
        is_whole = rule.name != "muon"  # which leaves the parameter to the second half, SGD's
        if is_whole and param.shape == (33, 41) and param.dtype == torch.float32:
            param.view(torch.int32)[-1, -1] ^= 1

    # Where the reference's step finds it; the package's attribute of this name is a function.
    monkeypatch.setattr(sys.modules["fusedopt.reference.step"], "update", off_by_one_bit)
    monkeypatch.setattr(self_check, "CLASSES", (cls,))
    assert self_check.self_check(["--backend", "cpu"]) == 1
    assert [cls.__name__, "FAILED"] in words(capsys.readouterr().out)


def test_one_wrong_bit_of_clipping_is_reported(monkeypatch, capsys):
    clip_grads = reference.clip_grads

    def off_by_one_bit(grads, max_norm, norm_type, *rest):
        result = clip_grads(grads, max_norm, norm_type, *rest)
        if norm_type == math.inf:
            grads[2].view(torch.int32)[-1, -1] ^= 1
        return result

    monkeypatch.setattr(reference, "clip_grads", off_by_one_bit)
    assert self_check.self_check(["--backend", "cpu"]) == 1
    assert ["clip_grad_norm_", "FAILED"] in words(capsys.readouterr().out)


def test_every_optimizer_is_checked():
    exported = {getattr(fusedopt, name) for name in fusedopt.__all__}
    optimizers = {
        cls for cls in exported if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)
    }
    assert optimizers - {fusedopt.FusedOptimizer} == set(self_check.CLASSES)


def test_without_torch_it_says_which_front_ends_are_there():
    code = "import runpy, sys; sys.modules['torch'] = None; "
    code += "runpy.run_module('fusedopt', run_name='__main__')"
    environment = {**os.environ, "KERAS_BACKEND": "torch"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"fusedopt {fusedopt.__version__}, without torch, ")
    assert "\nfusedopt.arrays: for NumPy " in done.stdout
    assert "\nfusedopt.keras: can't be used: " in done.stdout


def test_without_torch_and_kernels_it_fails(monkeypatch, capsys):
    def find_library(name):
        raise ImportError(f"there is no {name}")

    monkeypatch.setattr(front_ends.extension, "find_library", find_library)
    assert front_ends.report_without_torch() == 1
    assert "fusedopt.arrays: can't be used: there is no kernels" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("backend", "text"),
    [
        ("torch", "for Keras "),
        ("numpy", "can't be used: KERAS_BACKEND is numpy, and it works on jax, tensorflow, torch"),
    ],
)
def test_keras_and_the_backend_that_was_chosen(monkeypatch, backend, text):
    pytest.importorskip("keras")
    monkeypatch.setenv("KERAS_BACKEND", backend)
    assert front_ends.describe()["fusedopt.keras"].startswith(text)


def test_usage():
    help_text = run("--help").stdout
    assert help_text.startswith("usage: python -m fusedopt")
    assert "--backend {cpu,cuda}" in help_text
    assert run("--backend", "abacus").returncode == 2
