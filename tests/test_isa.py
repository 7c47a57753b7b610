"""Every instruction set that the CPU kernels are compiled for gives the bits of the reference."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fusedopt.core import backends

ISAS = ("baseline", "avx2", "avx512")


@pytest.mark.parametrize("isa", ISAS)
def test_self_check_with_a_lower_instruction_set(isa):
    assert backends._C is not None
    best = backends._C.cpu_isa()
    if ISAS.index(isa) > ISAS.index(best):
        pytest.skip(f"this processor has {best} at most")
    run = subprocess.run(
        [sys.executable, "-m", "fusedopt", "--backend", "cpu"],
        env={**os.environ, "FUSEDOPT_ISA": isa},
        capture_output=True,
        text=True,
    )
    assert f"{isa} kernels" in run.stdout
    assert "FAILED" not in run.stdout
    assert run.returncode == 0, run.stdout + run.stderr
