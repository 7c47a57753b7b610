"""One step: its state, and the operands and results of its custom calls."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fusedopt.core import c_library, jax_calls
from fusedopt.jax.custom_call import Operand, custom_call
from fusedopt.jax.formula import Formula
from fusedopt.jax.ranks import all_varying, check_same, check_spread, is_counted, spread


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


def sizes_by_dtype(leaves: Sequence[Any]) -> dict[str, int]:
    """How many elements the leaves of each dtype have together, in the order of the leaves."""
    sizes: dict[str, int] = {}
    for leaf in leaves:
        sizes[leaf.dtype.name] = sizes.get(leaf.dtype.name, 0) + math.prod(leaf.shape)
    return sizes


class Leaves(NamedTuple):
    """The leaves of the trees of parameters and gradients, and their places in the tree."""

    names: list[str]
    params: list[jax.Array]
    grads: list[jax.Array]


def call(
    formula: Formula, groups: Sequence[int], leaves: Leaves, state: State
) -> tuple[list[jax.Array], State]:
    """The new parameters and the new state, in the memory of the old ones where it is donated."""
    names, used = [*c_library.load().rules[formula.rule].states], formula.used()
    dtypes = [*sizes_by_dtype(leaves.params)]
    moments = [(name, dtype) for name in used for dtype in dtypes]  # in the kernels' order
    changed = _changed(leaves, state, moments)
    numbers = Operand("an option", formula.traced(state.count))
    total = Operand("the total", _total(formula, leaves))
    grads = [
        Operand(f"grads{name}", it) for name, it in zip(leaves.names, leaves.grads, strict=True)
    ]
    _check_ranks([numbers, *changed], all_varying(leaves.params))
    norm, count, skips, *rest = custom_call(
        jax_calls.STEP,
        [numbers, total, *changed[:2], *grads, *changed[2:]],
        [state.grad_norm, *(it.value for it in changed)],
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
    new_params, flat = rest[: len(leaves.params)], iter(rest[len(leaves.params) :])
    new_moments = {name: {dtype: next(flat) for dtype in dtypes} for name in used}
    return new_params, State(count, new_moments, skips, norm)


def _changed(leaves: Leaves, state: State, moments: list[tuple[str, str]]) -> list[Operand]:
    """What a step changes in place: the counts, the parameters, the moments by name and dtype."""
    params = zip(leaves.names, leaves.params, strict=True)
    named = [("state.count", state.count), ("state.skips", state.skips)]
    named += [(f"params{name}", it) for name, it in params]
    named += [(f"state.moments{[*it]}", state.moments[it[0]][it[1]]) for it in moments]
    return [Operand(name, value, 1 + k) for k, (name, value) in enumerate(named)]


def _check_ranks(operands: Sequence[Operand], axes: frozenset[str]) -> None:
    for name, value, _ in operands:
        if name.startswith("state.moments"):
            check_spread(name, value, axes)
        elif not name.startswith("params"):
            check_same(name, value)


def _total(formula: Formula, leaves: Leaves) -> jax.Array:
    """The sum of the ranks' messages, if they have different parts of parameters; else nothing."""
    axes = all_varying(leaves.params)
    if not axes:
        return jnp.zeros(0, jnp.int32)
    counted = jnp.array([is_counted(it, axes) for it in leaves.params], jnp.bool_)
    operands = [Operand("", it) for it in (counted, *leaves.grads)]
    like = spread(jnp.zeros(jax_calls.message_size(), jnp.int32), axes)
    (message,) = custom_call(jax_calls.MEASURE, operands, [like], rule=formula.rule)
    return jax.lax.psum(message, tuple(sorted(axes)))
