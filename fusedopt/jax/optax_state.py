"""Converts states from and to optax's, for checkpoints."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fusedopt.jax.step import State, sizes_by_dtype

# The fields of optax's states that hold our moments.
FIELDS = {
    "ScaleByAdamState": {"mu": "exp_avg", "nu": "exp_avg_sq"},
    "ScaleByRmsState": {"nu": "square_avg"},
    "ScaleByRStdDevState": {"mu": "grad_avg", "nu": "square_avg"},
    "TraceState": {"trace": "momentum_buffer"},
}


def to_optax(state: State, template: Any, *, learning_rate: float | None = None) -> Any:
    """A state of optax with our counts and moments.

    Args:
        state: of an optimizer of `fusedopt.jax`.
        template: what optax's own transformation made by `init(params)`. It may be a chain.
        learning_rate: of `rmsprop` with momentum, and only there.

    Returns:
        The template with all counts and moments replaced.

    Raises:
        ValueError: no part of the template has our moments, or the learning rate is missing.
    """
    written = set()
    factor = _momentum_factor(state, learning_rate)

    def convert(node: Any, fields: dict[str, str]) -> Any:
        moments = {}
        for field, name in fields.items():
            if name in state.moments:
                moment = _scaled(state.moments[name], factor if field == "trace" else 1.0)
                moments[field] = _unflatten(moment, getattr(node, field))
                written.add(name)
        counts = {"count": state.count} if "count" in node._fields else {}
        return node._replace(**moments, **counts)

    result = _map_states(template, convert)
    if missing := {*state.moments} - written:
        raise ValueError(f"template has no room for {', '.join(sorted(missing))}")
    return result


def from_optax(state: State, optax_state: Any, *, learning_rate: float | None = None) -> State:
    """Our state with optax's counts and moments.

    Args:
        state: what our `init(params)` returned.
        optax_state: the state of optax's optimizer of the same name, also within a chain.
        learning_rate: of `rmsprop` with momentum, and only there.

    Raises:
        ValueError: optax's state has not all moments that ours needs, or the learning rate is
            missing.
    """
    moments: dict[str, Any] = {}
    counts = []

    def collect(node: Any, fields: dict[str, str]) -> Any:
        moments.update({name: _flatten(getattr(node, it)) for it, name in fields.items()})
        if "count" in node._fields:
            counts.append(node.count)
        return node

    _map_states(optax_state, collect)
    if missing := {*state.moments} - {*moments}:
        raise ValueError(f"optax_state has no {', '.join(sorted(missing))}")
    if "momentum_buffer" in state.moments:
        factor = _momentum_factor(state, learning_rate)
        moments["momentum_buffer"] = _scaled(moments["momentum_buffer"], 1 / factor)
    count = jnp.asarray(counts[0], jnp.int32) if counts else state.count
    return state._replace(count=count, moments={name: moments[name] for name in state.moments})


def _momentum_factor(state: State, learning_rate: float | None) -> float:
    """What optax's sum of steps is a multiple of: RMSprop's holds the learning rate, and a sign."""
    if not {"square_avg", "momentum_buffer"} <= {*state.moments}:
        return 1.0
    if not learning_rate:
        raise ValueError(
            f"Invalid learning_rate value: {learning_rate}; expected that of rmsprop, a number "
            "> 0: optax's trace holds it, and our momentum_buffer does not"
        )
    return -learning_rate


def _scaled(moment: dict[str, jax.Array], factor: float) -> dict[str, jax.Array]:
    return {dtype: flat * factor for dtype, flat in moment.items()} if factor != 1 else moment


def _map_states(node: Any, change: Callable[[Any, dict[str, str]], Any]) -> Any:
    """Changes the states that hold moments or a count, wherever they are in the tree."""
    if type(node).__name__ in FIELDS or "count" in getattr(node, "_fields", ()):
        return change(node, FIELDS.get(type(node).__name__, {}))
    if isinstance(node, tuple):
        parts = [_map_states(part, change) for part in node]
        return type(node)(*parts) if hasattr(node, "_fields") else tuple(parts)
    return node


def _flatten(tree: Any) -> dict[str, jax.Array]:
    leaves = jax.tree.leaves(tree)
    return {
        dtype: jnp.concatenate([leaf.ravel() for leaf in leaves if leaf.dtype.name == dtype])
        for dtype in sizes_by_dtype(leaves)
    }


def _unflatten(flat: dict[str, jax.Array], like: Any) -> Any:
    begins = dict.fromkeys(flat, 0)

    def take(leaf: jax.Array) -> jax.Array:
        begin = begins[leaf.dtype.name]
        begins[leaf.dtype.name] = begin + leaf.size
        return flat[leaf.dtype.name][begin : begin + leaf.size].reshape(leaf.shape)

    return jax.tree.map(take, like)
