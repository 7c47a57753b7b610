"""The layers of csrc, and the length of all files and classes; only csrc/torch knows torch."""

from __future__ import annotations

import ast
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
    "c": {"door"},
    "ffi": {"c", "math"},  # one formula, of products that all steps have multiplied
    "tensorflow": {"c"},
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
    foreign = r"torch|ATen|c10|pybind11|[Pp]ython|xla|tensorflow"
    for path in sources():
        if layer_of(path.relative_to(CSRC)) not in ("torch", "ffi", "tensorflow"):
            found = [name for name in includes(path, "<(.+)>") if re.search(foreign, name)]
            assert not found, f"{path.relative_to(CSRC)} includes {found}"


def test_headers_that_take_seconds_to_compile_are_included_once():
    heavy = r"pybind11/pybind11|torch/csrc/(utils/pybind|autograd/|Exceptions)|ATen/(ops/|Expand)"
    # python_tensor.h includes one only for versions of torch that it wasn't compared with.
    places = {"aten.cpp", "bindings.cpp", "python_tensor.h"}
    files = {
        path.name
        for path in sources()
        for name in includes(path, "<(.+)>")
        if re.match(heavy, name)
    }
    assert files == places


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


# --- sizes
ROOT = CSRC.parent
MAX_FILE, MAX_CLASS = 400, 250  # lines


def python_files() -> list[Path]:
    folders = ("fusedopt", "tests", "benchmarks", "examples")
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def test_no_file_is_too_long():
    tests = (path for kind in ("*.h", "*.cpp") for path in (ROOT / "tests").rglob(kind))
    files = [*sources(), *tests, *python_files(), *ROOT.glob("*.py")]
    assert len(files) > 200
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert {name: count for name, count in lines.items() if count > MAX_FILE} == {}


def test_no_class_is_too_long():
    lines = {
        f"{path.relative_to(ROOT)}: {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for path in python_files()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    }
    assert len(lines) > 50
    assert {name: count for name, count in lines.items() if count > MAX_CLASS} == {}
