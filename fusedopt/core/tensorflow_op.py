"""TensorFlow's op of a step (csrc/tensorflow), loaded once."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import functools
from typing import Any

import tensorflow as tf

from fusedopt.core import c_library
from fusedopt.core.extension import INSTALL, find_library, minor, read_record


@functools.cache
def load() -> Any:
    """The function of the op: `csrc/tensorflow/step.cpp` describes its arguments.

    Raises:
        ImportError: it is not compiled, or for another TensorFlow.
    """
    c_library.load()
    path = find_library("tensorflow")
    built = read_record(path.parent).get("tensorflow") or "another version"
    if minor(built) != minor(tf.__version__):
        raise ImportError(
            f"{path} is compiled for TensorFlow {built}, but {tf.__version__} runs here. Build it "
            f"again: `{INSTALL}` in the source folder"
        )
    return tf.load_op_library(str(path)).fusedopt_step
