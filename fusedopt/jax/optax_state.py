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


def to_optax(state: State, template: Any) -> Any:
    """A state of optax with our counts and moments.

    Args:
        state: of an optimizer of `fusedopt.jax`.
        template: what optax's own transformation made by `init(params)`. It may be a chain.

    Returns:
        The template with all counts and moments replaced.

    Raises:
        ValueError: no part of the template has our moments.
    """
    written = set()

    def convert(node: Any, fields: dict[str, str]) -> Any:
        moments = {}
        for field, name in fields.items():
            if name in state.moments:
                moment = _signed(name, state.moments[name], {*state.moments})
                moments[field] = _unflatten(moment, getattr(node, field))
                written.add(name)
        counts = {"count": state.count} if "count" in node._fields else {}
        return node._replace(**moments, **counts)

    result = _map_states(template, convert)
    if missing := {*state.moments} - written:
        raise ValueError(f"template has no room for {', '.join(sorted(missing))}")
    return result


def from_optax(state: State, optax_state: Any) -> State:
    """Our state with optax's counts and moments.

    Args:
        state: what our `init(params)` returned.
        optax_state: the state of optax's optimizer of the same name, also within a chain.

    Raises:
        ValueError: optax's state has not all moments that ours needs.
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
    signed = {it: _signed(it, moments[it], {*state.moments}) for it in state.moments}
    count = jnp.asarray(counts[0], jnp.int32) if counts else state.count
    return state._replace(count=count, moments=signed)


def _signed(name: str, moment: dict[str, jax.Array], of_rule: set[str]) -> dict[str, jax.Array]:
    """A moment as the other library has it: with RMSprop, optax sums up what it will add."""
    if name != "momentum_buffer" or "square_avg" not in of_rule:
        return moment
    return {dtype: -flat for dtype, flat in moment.items()}


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
