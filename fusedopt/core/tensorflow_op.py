"""TensorFlow's op of a step (csrc/tensorflow), loaded once. TensorFlow is imported by `load`."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from fusedopt.core import c_library
from fusedopt.core.extension import INSTALL, find_library, minor, read_record


@functools.cache
def load() -> Any:
    """The function of the op: `csrc/tensorflow/step.cpp` describes its arguments.

    Raises:
        ImportError: it is not compiled, or for another TensorFlow.
    """
    import tensorflow as tf

    c_library.load()
    return tf.load_op_library(str(library_for(tf.__version__))).fusedopt_step


def library_for(version: str) -> Path:
    """The library of the op for this version of TensorFlow.

    Raises:
        ImportError: there is none.
    """
    path = find_library("tensorflow")
    built = read_record(path.parent).get("tensorflow") or "another version"
    if minor(built) != minor(version):
        raise ImportError(
            f"{path} is compiled for TensorFlow {built}, but {version} runs here. Build it again: "
            f"`{INSTALL}` in the source folder"
        )
    return path
