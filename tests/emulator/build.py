"""Builds the extension with its CUDA kernels running on the CPU: see cuda_runtime.h in this folder.

    python tests/emulator/build.py [--sanitize]

The module is called _C_emulated, or _C_sanitized with AddressSanitizer and UBSan in it; the latter
is imported only by a Python with their runtimes preloaded (`make sanitize`).
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
BUILD = HERE.parent.parent / "build" / "emulator"

FLAGS = [
    "-O1",
    "-fopenmp",
    "-ffp-contract=off",
    "-fvisibility=hidden",
    "-Wno-unknown-pragmas",
    "-DFUSEDOPT_WITH_CUDA=1",
    "-DFUSEDOPT_CUDA_DEVICE=c10::kCPU",
]
SANITIZERS = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


def build(sanitize: bool = False) -> Path:
    """Compiles what has changed. Returns the path of the module."""
    from torch.utils.cpp_extension import load

    name = "_C_sanitized" if sanitize else "_C_emulated"
    folder = BUILD / name
    folder.mkdir(parents=True, exist_ok=True)
    extra = SANITIZERS if sanitize else []
    sources = [*CSRC.glob("*.cpp"), *CSRC.glob("cpu/*.cpp"), HERE / "passes.cpp"]
    load(
        name,
        sorted(map(str, sources)),
        extra_cflags=FLAGS + extra,
        extra_ldflags=["-fopenmp", *extra],
        extra_include_paths=[str(HERE)],
        build_directory=str(folder),
        is_python_module=False,
        is_standalone=True,  # build only: the sanitized one can't be loaded here
    )
    return folder / f"{name}.so"


def import_built(sanitize: bool = False) -> ModuleType:
    name = "_C_sanitized" if sanitize else "_C_emulated"
    path = BUILD / name / f"{name}.so"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.exists():
        raise ImportError(f"{path} is missing: python tests/emulator/build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    print(build(sanitize="--sanitize" in sys.argv[1:]))
