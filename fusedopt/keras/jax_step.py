"""One step of a rule as custom calls, over the arrays of Keras's variables."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fusedopt.core import c_library, jax_calls

# XLA compiles a call ever more slowly, the more results lie in the memory of its operands.
MAX_VARIABLES = 64


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

    def part(self, which: slice) -> Formula:
        """The formula of some of the variables."""
        return self._replace(groups=self.groups[which])


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

    def part(self, which: slice) -> Arrays:
        """Those of some of the variables."""
        states = {name: kept[which] for name, kept in self.states.items()}
        return self._replace(params=self.params[which], states=states)


def take_step(
    formula: Formula,
    lr: jax.Array,
    scale: jax.Array | None,
    grads: Sequence[jax.Array],
    arrays: Arrays,
) -> tuple[jax.Array, Arrays]:
    """The gradient norm, and the new arrays, in the memory of the old ones where it is donated.

    Many variables are shared out to several calls, which all take the exact sum of squares of all
    gradients. So they all have the same norm, skip together, and leave the same scalars.
    """
    jax_calls.register()
    parts = [slice(k, k + MAX_VARIABLES) for k in range(0, len(grads), MAX_VARIABLES)]
    total = _measure(formula, grads) if len(parts) > 1 else jnp.zeros(0, jnp.int32)
    norms, done = zip(
        *(_call(formula.part(it), lr, scale, total, grads[it], arrays.part(it)) for it in parts)
    )
    params = [it for part in done for it in part.params]
    states = {name: [it for part in done for it in part.states[name]] for name in arrays.states}
    return norms[0], done[0]._replace(params=params, states=states)


def _measure(formula: Formula, grads: Sequence[jax.Array]) -> jax.Array:
    """The exact sum of squares of all gradients."""
    counted = jnp.ones(len(grads), jnp.bool_)
    result = jax.ShapeDtypeStruct((jax_calls.message_size(),), jnp.int32)
    return jax.ffi.ffi_call(jax_calls.MEASURE, result)(counted, *grads, rule=formula.rule)


def _call(
    formula: Formula,
    lr: jax.Array,
    scale: jax.Array | None,
    total: jax.Array,
    grads: Sequence[jax.Array],
    arrays: Arrays,
) -> tuple[jax.Array, Arrays]:
    """The step of variables that are few enough for one call."""
    names = [*c_library.load().rules[formula.rule].states]
    used = [name for name in names if name in arrays.states]
    states = [it for name in used for it in arrays.states[name]]
    small, large = [arrays.count, arrays.skips, *arrays.scalars], [*arrays.params, *states]
    factor = jnp.ones((), jnp.float32) if scale is None else scale
    numbers = [jnp.asarray(it).astype(jnp.float32) for it in (lr, factor)]
    numbers.append(total)
    before = len(numbers) + len(small) + len(grads)  # the operands before `large`
    in_place = {len(numbers) + k: 1 + k for k in range(len(small))}
    in_place |= {before + k: 1 + len(small) + k for k in range(len(large))}
    results = [jax.ShapeDtypeStruct((), jnp.float32)]
    results += [jax.ShapeDtypeStruct(it.shape, it.dtype) for it in (*small, *large)]
    call = jax.ffi.ffi_call(jax_calls.KERAS_STEP, results, input_output_aliases=in_place)
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
