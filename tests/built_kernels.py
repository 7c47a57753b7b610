"""The machine code of the CUDA kernels that are built here."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest
from sass import Code, disassemble, disassembler
from test_build import ROOT, setup


def built_kernels(architecture: str) -> dict[str, Code]:
    """The instructions of each kernel for compute capability `architecture` ("90").

    Skips the test where no kernels are built, or nothing can disassemble them.
    """
    cuobjdump, objects = disassembler(), built_objects(architecture)
    if cuobjdump is None:
        pytest.skip("no cuobjdump here: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    if not objects:
        pytest.skip(f"no CUDA kernels are built here of these sources for sm_{architecture}")
    return disassemble(cuobjdump, objects, architecture)


def built_objects(architecture: str) -> list[Path]:
    """The CUDA kernels' objects that are up to date and compiled for this architecture."""
    before = os.getcwd()
    os.chdir(ROOT)  # which the compiler's lists of included files are relative to
    try:
        stamps = [it.absolute() for it in Path().glob("build/temp*/cuda_*.command")]
        return [
            stamp.with_suffix(".o")
            for stamp in stamps
            if re.search(rf"\bsm_{architecture}\b", stamp.read_text())
            and setup.is_current(stamp.with_suffix(".o"), shlex.split(stamp.read_text()))
        ]
    finally:
        os.chdir(before)
