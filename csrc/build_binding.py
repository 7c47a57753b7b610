"""Compiles torch's binding, `_C.so`, for the torch of the Python that runs this file.

    python build_binding.py FOLDER LIBRARY [--rpath PATH]

It needs ninja, and a C++ compiler. The kernels' library is not compiled: it knows no torch.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from toolchain import CXX_FLAGS, check_compiler, openmp
from torch.utils import cpp_extension

CSRC = Path(__file__).resolve().parent


def build(folder: Path, library: Path, rpath: str) -> Path:
    """Returns the path of the binding, which finds the library in `rpath`."""
    check_compiler()
    compiling, linking = openmp()
    cpp_extension.load(
        name="_C",
        sources=sorted(map(str, CSRC.glob("torch/*.cpp"))),
        extra_cflags=[*CXX_FLAGS, *compiling, "-iquote", quoted(CSRC)],
        extra_ldflags=[
            *linking,
            quoted(f"-L{library.parent}"),
            quoted(f"-l{library.stem.removeprefix('lib')}"),
            quoted(f"-Wl,-rpath,{rpath}"),
        ],
        build_directory=str(folder),
        is_python_module=False,  # loaded, to see that it links; not imported
    )
    return folder / "_C.so"


def quoted(argument: object) -> str:
    """The argument as ninja's file has it, where $ begins a variable, for a shell to read."""
    return shlex.quote(str(argument)).replace("$", "$$")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("library", type=Path)
    parser.add_argument("--rpath", help="where the binding finds the library; its own folder")
    arguments = parser.parse_args()
    library = arguments.library.resolve()
    print(build(arguments.folder.resolve(), library, arguments.rpath or str(library.parent)))
