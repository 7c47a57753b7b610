"""One step of a rule as a custom call, over the arrays of Keras's variables."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fusedopt.core import c_library
from fusedopt.core.extension import find_library

TARGET = "fusedopt_keras_step"


class Formula(NamedTuple):
    """A rule with constants.

    Attributes:
        rule: its name.
        options: for each group of variables, the options by torch's names, without `lr`.
        groups: the group of each variable.
        max_grad_norm: the limit, or None.
        skip_nonfinite: whether a step is skipped if a gradient holds inf or nan.
    """

    rule: str
    options: tuple[dict[str, Any], ...]
    groups: tuple[int, ...]
    max_grad_norm: float | None
    skip_nonfinite: bool

    def constants(self) -> Any:
        """The numbers of all options of all groups, in the order of the kernels."""
        numbers = [it for group in self.options for it in c_library.in_order(self.rule, group)]
        return np.array(numbers, np.float64)


class Arrays(NamedTuple):
    """What a step reads and changes.

    Attributes:
        count: how many steps were applied, int32.
        skips: how many were skipped, int32.
        scalars: the rule's other scalars, float32.
        params: one for each gradient.
        states: by the names of the rule's states, one for each gradient.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    skips: jax.Array
    scalars: list[jax.Array]
    params: list[jax.Array]
    states: dict[str, list[jax.Array]]


@functools.cache
def register() -> None:
    """Makes the custom call known to JAX, once.

    Raises:
        ImportError: it is not compiled.
    """
    c_library.load()
    library = ctypes.CDLL(str(find_library("jax")))
    jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(library.fusedopt_keras_step), "cpu")


def take_step(
    formula: Formula,
    lr: jax.Array,
    scale: jax.Array | None,
    grads: Sequence[jax.Array],
    arrays: Arrays,
) -> tuple[jax.Array, Arrays]:
    """The gradient norm, and the new arrays, in the memory of the old ones where it is donated."""
    register()
    names = [*c_library.load().rules[formula.rule].states]
    used = [name for name in names if name in arrays.states]
    states = [it for name in used for it in arrays.states[name]]
    small, large = [arrays.count, arrays.skips, *arrays.scalars], [*arrays.params, *states]
    factor = jnp.ones((), jnp.float32) if scale is None else scale
    numbers = [jnp.asarray(it).astype(jnp.float32) for it in (lr, factor)]
    before = len(numbers) + len(small) + len(grads)  # the operands before `large`
    in_place = {len(numbers) + k: 1 + k for k in range(len(small))}
    in_place |= {before + k: 1 + len(small) + k for k in range(len(large))}
    results = [jax.ShapeDtypeStruct((), jnp.float32)]
    results += [jax.ShapeDtypeStruct(it.shape, it.dtype) for it in (*small, *large)]
    call = jax.ffi.ffi_call(TARGET, results, input_output_aliases=in_place)
    norm, count, skips, *rest = call(
        *numbers,
        *small,
        *grads,
        *large,
        rule=formula.rule,
        constants=formula.constants(),
        groups=np.array(formula.groups, np.int32),
        num_groups=np.int64(len(formula.options)),
        num_states=np.int64(len(names)),
        num_scalars=np.int64(len(arrays.scalars)),
        states_used=np.int64(sum(1 << names.index(name) for name in used)),
        max_grad_norm=np.float64(formula.max_grad_norm or math.inf),
        skip_nonfinite=np.bool_(formula.skip_nonfinite),
        is_scaled=np.bool_(scale is not None),
    )
    new = iter(rest)
    scalars = [*islice(new, len(arrays.scalars))]
    params = [*islice(new, len(grads))]
    return norm, Arrays(
        count, skips, scalars, params, {name: [*islice(new, len(grads))] for name in used}
    )
