"""Compiles TensorFlow's op, `libfusedopt_tensorflow.so`, for the TensorFlow that Python imports.

    python build_op.py FOLDER LIBRARY [--rpath PATH]

It prints the version of TensorFlow. The kernels' library is not compiled: it knows no TensorFlow.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import argparse
import re
import subprocess
from pathlib import Path

import tensorflow as tf
from toolchain import CXX_FLAGS, check_compiler, cxx

CSRC = Path(__file__).resolve().parent
NAME = "libfusedopt_tensorflow.so"


def build(folder: Path, library: Path, rpath: str) -> Path:
    """Returns the path of the op, which finds the library in `rpath`."""
    check_compiler(python=False)
    folder.mkdir(parents=True, exist_ok=True)
    # Its headers may warn. Quoted includes alone: csrc/tensorflow is not to stand in for its own.
    flags = [re.sub("^-I", "-isystem", flag) for flag in tf.sysconfig.get_compile_flags()]
    flags += ["-std=c++17", "-fPIC", *CXX_FLAGS, "-fvisibility=default", "-iquote", str(CSRC)]
    flags.append("-Wno-deprecated-declarations")  # new names, which older TensorFlows lack
    made = folder / "tensorflow_step.o"
    source = CSRC / "tensorflow/step.cpp"
    subprocess.run([*cxx(), *flags, "-c", str(source), "-o", str(made)], check=True)
    name = library.stem.removeprefix("lib")
    linking = [f"-L{library.parent}", f"-l{name}", f"-Wl,-rpath,{rpath}"]
    linking += tf.sysconfig.get_link_flags()
    command = [*cxx(), "-shared", str(made), *linking, "-o", str(folder / NAME)]
    subprocess.run(command, check=True)
    return folder / NAME


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("library", type=Path)
    parser.add_argument("--rpath", help="where the op finds the library; its own folder")
    arguments = parser.parse_args()
    library = arguments.library.resolve()
    build(arguments.folder.resolve(), library, arguments.rpath or str(library.parent))
    print(tf.__version__)
