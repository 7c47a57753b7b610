"""What nvcc has made of the kernels: 16 bytes an access, and nothing in local memory."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
from test_build import ROOT, setup

ARCHITECTURE = "90"


def disassembler() -> str | None:
    """cuobjdump of the toolkit, or the one that Triton brings."""
    found = shutil.which("cuobjdump") or shutil.which("cuobjdump", path="/usr/local/cuda/bin")
    spec = find_spec("triton") if found is None else None
    if spec is not None and spec.submodule_search_locations:
        folder = Path(spec.submodule_search_locations[0], "backends/nvidia/bin")
        found = shutil.which("cuobjdump", path=str(folder))
    return found


@pytest.fixture(scope="module")
def kernels() -> dict[str, list[str]]:
    """Instructions by kernel, as they have been built."""
    cuobjdump, objects = disassembler(), built_objects()
    if cuobjdump is None:
        pytest.skip("no cuobjdump here: it comes with CUDA's development files, and with Triton")
    if not objects:
        pytest.skip(f"no CUDA kernels are built here of these sources for sm_{ARCHITECTURE}")
    command = [cuobjdump, "-sass", "-arch", f"sm_{ARCHITECTURE}"]
    text = "".join(
        subprocess.run([*command, it], check=True, capture_output=True, text=True).stdout
        for it in objects
    )
    _, *parts = re.split(r"Function : (\S+)", text)
    instructions = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9._]*)")
    found = {
        name: instructions.findall(part) for name, part in zip(parts[::2], parts[1::2], strict=True)
    }
    assert len(main_kernels(found)) >= 4
    return found


def built_objects() -> list[Path]:
    """The CUDA kernels' objects that are of these sources and have this architecture."""
    before = os.getcwd()
    os.chdir(ROOT)  # which the compiler's lists of included files are relative to
    try:
        stamps = [it.absolute() for it in Path().glob("build/temp*/cuda_*.command")]
        return [
            stamp.with_suffix(".o")
            for stamp in stamps
            if re.search(rf"\bsm_{ARCHITECTURE}\b", stamp.read_text())
            and setup.is_current(stamp.with_suffix(".o"), shlex.split(stamp.read_text()))
        ]
    finally:
        os.chdir(before)


def main_kernels(kernels: dict[str, list[str]]) -> dict[str, list[str]]:
    return {n: code for n, code in kernels.items() if "update_kernel" in n or "grad_norm" in n}


def test_arrays_are_read_16_bytes_at_a_time(kernels):
    for name, code in main_kernels(kernels).items():
        assert sum(op.startswith("LDG.E.128") for op in code) >= 4, name


def test_arrays_are_written_16_bytes_at_a_time(kernels):
    for name, code in kernels.items():
        if "update_kernel" in name:
            assert sum(op.startswith("STG.E.128") for op in code) >= 4, name


def test_the_compiler_knows_that_arrays_are_in_global_memory(kernels):
    """LD and ST, without a G, find out at each access which memory it goes to."""
    for name, code in main_kernels(kernels).items():
        assert not [op for op in code if re.match(r"(LD|ST)\.E\.128", op)], name


def test_nothing_lies_in_local_memory(kernels):
    for name, code in kernels.items():
        assert not [op for op in code if re.match(r"(LDL|STL)\b", op)], name


def test_16_bit_types_are_rounded_by_single_instructions(kernels):
    for name, code in kernels.items():
        if "update_kernel" in name:
            counts = [sum(op.startswith(f"F2FP.{kind}") for op in code) for kind in ("BF16", "F16")]
            assert counts[0] == counts[1] > 0, name
