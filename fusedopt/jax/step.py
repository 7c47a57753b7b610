"""One step as a custom call of a compiled program."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fusedopt.core import c_library
from fusedopt.core.extension import find_library
from fusedopt.jax.formula import Formula

TARGET = "fusedopt_step"


class State(NamedTuple):
    """The state of an optimizer.

    Attributes:
        count: how many steps were applied, int32.
        moments: by torch's name of a state and by dtype, a flat array: the states of all
            parameters of this dtype, one after another.
        skips: how many steps were skipped, int32.
        grad_norm: the global gradient norm of the last step before clipping, float32.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    moments: dict[str, dict[str, jax.Array]]
    skips: jax.Array
    grad_norm: jax.Array


@functools.cache
def register() -> None:
    """Makes the custom call known to JAX, once.

    Raises:
        ImportError: it is not compiled.
    """
    c_library.load()
    library = ctypes.CDLL(str(find_library("jax")))
    jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(library.fusedopt_jax_step), "cpu")


def sizes_by_dtype(leaves: Sequence[Any]) -> dict[str, int]:
    """How many elements the leaves of each dtype have together, in the order of the leaves."""
    sizes: dict[str, int] = {}
    for leaf in leaves:
        sizes[leaf.dtype.name] = sizes.get(leaf.dtype.name, 0) + math.prod(leaf.shape)
    return sizes


def call(
    formula: Formula,
    groups: Sequence[int],
    params: Sequence[jax.Array],
    grads: Sequence[jax.Array],
    state: State,
) -> tuple[list[jax.Array], State]:
    """The new parameters and the new state, in the memory of the old ones where it is donated."""
    register()
    names, used = [*c_library.load().rules[formula.rule].states], formula.used()
    dtypes = [*sizes_by_dtype(params)]
    moments = [state.moments[name][dtype] for name in used for dtype in dtypes]
    first = 3 + len(grads)
    operands = [formula.traced(state.count), state.count, state.skips, *grads, *params, *moments]
    results = [jax.ShapeDtypeStruct((), jnp.float32)]
    results += [jax.ShapeDtypeStruct(it.shape, it.dtype) for it in operands[1:3]]
    results += [jax.ShapeDtypeStruct(it.shape, it.dtype) for it in operands[first:]]
    in_place = {1: 1, 2: 2} | {first + k: 3 + k for k in range(len(operands) - first)}
    norm, count, skips, *rest = jax.ffi.ffi_call(TARGET, results, input_output_aliases=in_place)(
        *operands,
        rule=formula.rule,
        constants=formula.constants(),
        places=formula.places(),
        factors=formula.factor_places(),
        groups=np.array(groups, np.int32),
        num_groups=np.int64(len(formula.options)),
        num_states=np.int64(len(names)),
        states_used=np.int64(sum(1 << names.index(name) for name in used)),
        skip_nonfinite=np.bool_(formula.skip_nonfinite),
    )
    new_params, flat = rest[: len(params)], iter(rest[len(params) :])
    new_moments = {name: {dtype: next(flat) for dtype in dtypes} for name in used}
    return new_params, State(count, new_moments, skips, norm)
