"""A C++ program steps with the kernels' library alone, and is refused a step laid out wrongly."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from fusedopt.core import backends

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """The lines that front_end.cpp prints."""
    compiler = shutil.which("c++")
    if compiler is None or backends._C is None:
        pytest.skip("it needs a C++ compiler and the compiled kernels")
    folder = Path(backends._C.__file__).parent
    program = tmp_path_factory.mktemp("front_end") / "front_end"
    command = [compiler, "-std=c++17", f"-I{ROOT / 'csrc'}", ROOT / "tests/front_end.cpp"]
    command += ["-o", program, f"-L{folder}", "-lfusedopt_kernels", f"-Wl,-rpath,{folder}"]
    subprocess.run([*map(str, command)], check=True)
    done = subprocess.run([str(program)], check=True, capture_output=True, text=True)
    return done.stdout.splitlines()


def test_a_step_without_torch(printed):
    """The norm of the gradient (1, 1, 1, 1) is 2: it is clipped to 0.5, and lr is 0.5."""
    assert printed[0] == "0 0.75 1.75 2.75 3.75 2 0.5"


def test_wrong_layouts_are_refused(printed):
    assert printed[1:] == [
        "adam: the step was laid out for another rule",
        "sgd: the step was laid out for another limit",
        "sgd: the step was laid out for the other kind of device",
        "tensor 0 has a gradient of a storage that its kernels don't take",
        "tensor 0 has a state of a storage that its kernels don't take",
        "tensor 0 has a storage that no kernel knows",
        "tensor 0 has elements that are no whole number of rows",
        "tensor 0 has a group that doesn't exist",
    ]
