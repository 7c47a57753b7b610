"""The kernels as XLA's custom calls (csrc/ffi), made known to JAX once. `register` imports JAX."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import ctypes
import functools

from fusedopt.core import c_library
from fusedopt.core.extension import find_library

STEP = "fusedopt_jax_step"
KERAS_STEP = "fusedopt_keras_step"
MEASURE = "fusedopt_jax_measure"
PIECES = 4  # of 16 bits, of a number of the message between ranks: csrc/ffi/message.h


@functools.cache
def register() -> None:
    """Makes the custom calls known to JAX.

    Raises:
        ImportError: they are not compiled.
    """
    import jax

    c_library.load()
    library = ctypes.CDLL(str(find_library("jax")))
    for target in (STEP, KERAS_STEP, MEASURE):
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, target)), "cpu")


def message_size() -> int:
    """How many numbers of int32 the result of MEASURE has, and the total that a step takes."""
    return c_library.load().message_size * PIECES
