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
from numpy.typing import NDArray

from fusedopt.core import c_library
from fusedopt.core.extension import find_library

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


class Formula(NamedTuple):
    """A rule with options.

    Attributes:
        rule: its name.
        options: per group of parameters, the options by torch's names.
        learning_rate: a number, an array, or a function of the count of steps.
        max_grad_norm: see `adamw`.
        skip_nonfinite: whether a step is skipped if a gradient holds inf or nan.
    """

    rule: str
    options: tuple[dict[str, Any], ...]
    learning_rate: Any
    max_grad_norm: float | None
    skip_nonfinite: bool

    def numbers(self) -> NDArray[np.float64]:
        """Per group, the numbers of all options in the order of the kernels."""
        names = c_library.load().rules[self.rule].options
        constant = 0.0 if self.is_traced() else float(self.learning_rate)
        rows = []
        for group in self.options:
            values = {**dict.fromkeys(names, 0.0), "lr": constant, **group}
            rows.append(np.concatenate([np.atleast_1d(values[name]) for name in names]))
        return np.array(rows, np.float64)

    def is_traced(self) -> bool:
        return callable(self.learning_rate) or isinstance(self.learning_rate, jax.Array)

    def used(self) -> list[str]:
        """The names of the states that the rule uses."""
        return c_library.states_used(self.rule, self.numbers()[0].ctypes.data)

    def lr(self, count: jax.Array) -> jax.Array:
        rate = self.learning_rate(count) if callable(self.learning_rate) else self.learning_rate
        return jnp.asarray(rate if self.is_traced() else 0.0, jnp.float32)


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
    library, used = c_library.load(), formula.used()
    dtypes = [*sizes_by_dtype(params)]
    moments = [state.moments[name][dtype] for name in used for dtype in dtypes]
    first = 3 + len(grads)
    operands = [formula.lr(state.count), state.count, state.skips, *grads, *params, *moments]
    results = [jax.ShapeDtypeStruct((), jnp.float32)]
    results += [jax.ShapeDtypeStruct(it.shape, it.dtype) for it in operands[1:3]]
    results += [jax.ShapeDtypeStruct(it.shape, it.dtype) for it in operands[first:]]
    in_place = {1: 1, 2: 2} | {first + k: 3 + k for k in range(len(operands) - first)}
    names = [*library.rules[formula.rule].states]
    limit = formula.max_grad_norm
    made = jax.ffi.ffi_call(TARGET, results, input_output_aliases=in_place)(
        *operands,
        rule=formula.rule,
        options=formula.numbers().ravel(),
        groups=np.array(groups, np.int32),
        num_groups=np.int64(len(formula.options)),
        num_states=np.int64(len(names)),
        states_used=np.int64(sum(1 << names.index(name) for name in used)),
        traced_lr=np.bool_(formula.is_traced()),
        max_grad_norm=np.float64(math.inf if limit is None else limit),
        skip_nonfinite=np.bool_(formula.skip_nonfinite),
    )
    norm, count, skips, *rest = made
    new_params, flat = rest[: len(params)], iter(rest[len(params) :])
    new_moments = {name: {dtype: next(flat) for dtype in dtypes} for name in used}
    return new_params, State(count, new_moments, skips, norm)
