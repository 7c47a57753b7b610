"""TensorFlow's op of a step (csrc/tensorflow), loaded once. TensorFlow is imported by `load`."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from fusedopt.core import c_library, first_build
from fusedopt.core.extension import find_library, minor, read_record


@functools.cache
def load() -> Any:
    """The function of the op: `csrc/tensorflow/step.cpp` describes its arguments.

    Raises:
        ImportError: it is not compiled, and can't be.
    """
    import tensorflow as tf

    c_library.load()
    return tf.load_op_library(str(library_for(tf.__version__))).fusedopt_step


def library_for(version: str) -> Path:
    """The library of the op for this version of TensorFlow, from the package or compiled now.

    Raises:
        ImportError: there is none, and none can be compiled.
    """
    try:
        return found(version)
    except ImportError as error:
        package = find_library("kernels").parent
        try:
            return first_build.compiled(package, version, first_build.OP)
        except ImportError as other:
            raise ImportError(f"{error}, and {other}") from None


def found(version: str) -> Path:
    """The library in the package.

    Raises:
        ImportError: there is none for this version.
    """
    path = find_library("tensorflow")
    built = read_record(path.parent).get("tensorflow") or "another version"
    if minor(built) != minor(version):
        raise ImportError(f"{path} is compiled for TensorFlow {built}, but {version} runs here")
    return path


def why_not(version: str) -> str | None:
    """Why there is no library for this version, and none can be compiled; None if one can."""
    try:
        found(version)
    except ImportError as error:
        try:
            package = find_library("kernels").parent
        except ImportError as other:
            return str(other)
        if first_build.why_not(package, first_build.OP) is not None:
            return str(error)
    return None
