"""The kernels as XLA's custom calls (csrc/ffi), made known to JAX once. `register` imports JAX."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import ctypes
import functools

from fusedopt.core import c_library
from fusedopt.core.extension import find_library

STEP = "fusedopt_jax_step"
KERAS_STEP = "fusedopt_keras_step"
CUDA_STEP = "fusedopt_jax_cuda_step"  # STEP, on a GPU
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
    targets = [("cpu", it, it) for it in (STEP, KERAS_STEP, MEASURE)]
    for platform, target, name in (*targets, ("CUDA", STEP, CUDA_STEP)):
        function = jax.ffi.pycapsule(getattr(library, name))
        jax.ffi.register_ffi_target(target, function, platform)


def message_size() -> int:
    """How many numbers of int32 the result of MEASURE has, and the total that a step takes."""
    return c_library.load().message_size * PIECES
