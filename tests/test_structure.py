"""The layers of csrc: the includes that are allowed; only csrc/torch knows torch and Python."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fusedopt.core import backends

CSRC = Path(__file__).parent.parent / "csrc"
KERNELS = {"cpu", "cuda", "core", "rules", "math"}

# From each layer, the layers that it may include beside itself. "door" is kernels.h.
ALLOWED = {
    "torch": {"door"},
    "door": {"core", "rules"},
    "cpu": {"core", "rules", "math"},
    "cuda": {"core", "rules", "math"},
    "core": {"math"},
    "rules": {"math"},
    "math": set(),
}


def layer_of(path: Path | str) -> str:
    folder = Path(path).parent.name
    return folder or "door"


def includes(path: Path, pattern: str) -> list[str]:
    return re.findall(rf"^\s*#\s*include\s*{pattern}", path.read_text(), re.MULTILINE)


def sources() -> list[Path]:
    files = [path for path in CSRC.rglob("*.*") if path.suffix in (".h", ".cpp", ".cuh", ".cu")]
    assert len(files) > 50
    return files


def test_every_include_goes_down():
    for path in sources():
        relative = path.relative_to(CSRC)
        layer = "implementation" if str(relative) == "kernels.cpp" else layer_of(relative)
        allowed = {"door", *KERNELS} if layer == "implementation" else ALLOWED[layer] | {layer}
        for name in includes(path, r'"(.+)"'):
            assert (CSRC / name).exists(), f"{relative} includes {name}, from csrc on"
            assert layer_of(name) in allowed, f"{relative} includes {name}"


def test_no_kernel_knows_torch_or_python():
    foreign = r"torch|ATen|c10|pybind11|[Pp]ython"
    for path in sources():
        if layer_of(path.relative_to(CSRC)) != "torch":
            found = [name for name in includes(path, "<(.+)>") if re.search(foreign, name)]
            assert not found, f"{path.relative_to(CSRC)} includes {found}"


def test_cuda_headers_stay_in_cuda():
    for path in sources():
        relative = path.relative_to(CSRC)
        if layer_of(relative) != "cuda":
            assert not includes(path, "<(cuda.*)>"), relative


def test_the_library_of_kernels_loads_without_torch():
    if backends._C is None:
        pytest.skip("the extension is not built")
    library = Path(backends._C.__file__).with_name("libfusedopt_kernels.so")
    code = f"""if True:
        import ctypes, sys
        ctypes.CDLL({str(library)!r})
        mapped = open("/proc/self/maps").read()
        assert "torch" not in sys.modules and "libtorch" not in mapped and "libc10" not in mapped
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
