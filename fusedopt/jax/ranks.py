"""Steps inside of `jax.shard_map`, where each rank has its part of the arrays."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax


def in_shard_map() -> bool:
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


def varying(array: Any) -> frozenset[str]:
    """The axes of the mesh along which the ranks' arrays differ."""
    return jax.typeof(array).manual_axis_type.varying


def all_varying(arrays: Iterable[Any]) -> frozenset[str]:
    return frozenset[str]().union(*map(varying, arrays))


def spread(array: Any, axes: frozenset[str]) -> Any:
    """The same array, declared to differ along these axes."""
    missing = tuple(sorted(axes - varying(array)))
    return jax.lax.pcast(array, missing, to="varying") if missing else array


def is_counted(param: Any, axes: frozenset[str]) -> jax.Array | bool:
    """Whether this rank counts the gradient: the first of those that have the same part does."""
    counted: Any = True
    for axis in sorted(axes - varying(param)):
        counted = counted & (jax.lax.axis_index(axis) == 0)
    return counted


def check_mesh() -> None:
    """Refuses a `jax.shard_map` that doesn't show what differs between ranks.

    Raises:
        ValueError: it doesn't.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.manual_axes:
        return
    if automatic := {*mesh.axis_names} - {*mesh.manual_axes}:
        raise ValueError(
            f"the mesh has the axes {', '.join(sorted(automatic))} that jax.shard_map leaves to "
            "XLA; expected a shard_map over all axes"
        )
    for axis in mesh.axis_names:
        if mesh.shape[axis] > 1 and axis not in varying(jax.lax.axis_index(axis)):
            raise ValueError(
                "this program doesn't say which arrays are sharded; expected "
                "jax.shard_map(..., check_vma=True), its default"
            )


def check_same(name: str, array: Any) -> None:
    """Refuses a number that isn't the same on all ranks.

    Raises:
        ValueError: it differs.
    """
    if axes := varying(array):
        raise ValueError(f"{name} differs along {_text(axes)}; expected one number for all ranks")


def check_spread(name: str, array: Any, axes: frozenset[str]) -> None:
    """Refuses a moment that isn't one per rank, where parameters are.

    Raises:
        ValueError: it isn't.
    """
    if missing := axes - varying(array):
        raise ValueError(
            f"{name} is the same along {_text(missing)}, and parameters are sharded there; "
            "expected the state of an init() inside of jax.shard_map, with "
            f"State(P(), P({tuple(sorted(axes))}), P(), P()) as its spec"
        )


def check_added_up(name: str, grad: Any, param: Any) -> None:
    """Refuses a gradient that differs between ranks that share the parameter.

    Raises:
        ValueError: it differs.
    """
    if more := varying(grad) - varying(param):
        raise ValueError(
            f"{name} differs along {_text(more)}, and its parameter doesn't; expected the sum or "
            "the mean over ranks: use jax.lax.psum or jax.lax.pmean"
        )


def _text(axes: Iterable[str]) -> str:
    return ", ".join(map(repr, sorted(axes)))
