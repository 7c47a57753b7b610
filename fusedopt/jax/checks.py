"""Refuses trees that no step can take. The error names the leaf."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

from typing import Any

import jax

from fusedopt.core import c_library
from fusedopt.jax.custom_call import check_not_sharded
from fusedopt.jax.formula import is_traced
from fusedopt.jax.ranks import check_added_up, check_mesh
from fusedopt.jax.step import Leaves


def check_argument(name: str, value: Any, expected: Any, advice: str) -> None:
    """Refuses an argument of optax's that the kernels have only one value of.

    Raises:
        ValueError: it has another value.
    """
    if is_traced(value):
        raise ValueError(f"Invalid {name} value: an array; expected {expected}: {advice}")
    if value != expected:
        raise ValueError(f"Invalid {name} value: {value}; expected {expected}: {advice}")


def check_params(params: Any) -> list[jax.Array]:
    """The leaves of the tree.

    Raises:
        TypeError: a leaf is no array of a dtype that the kernels have.
        ValueError: a leaf is sharded, or `jax.shard_map` doesn't show which ones are.
    """
    known = c_library.load().dtypes
    check_mesh()
    leaves = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        dtype = getattr(getattr(leaf, "dtype", None), "name", type(leaf).__name__)
        name = f"params{jax.tree_util.keystr(path)}"
        if dtype not in known:
            raise TypeError(f"{name} is {dtype}; expected one of {', '.join(known)}")
        check_not_sharded(name, leaf)
        leaves.append(leaf)
    return leaves


def check_leaves(params: Any, grads: Any) -> Leaves:
    """The leaves of both trees.

    Raises:
        ValueError: the trees differ, or a shape does, or a leaf is sharded, or a gradient is not
            added up over ranks.
        TypeError: a dtype differs, or is none that the kernels have.
    """
    leaves = check_params(params)
    found, structure = jax.tree.flatten(grads)
    if structure != jax.tree.structure(params):
        expected = jax.tree.structure(params)
        raise ValueError(f"grads has the structure {structure}; expected {expected}, as params")
    paths = jax.tree_util.tree_flatten_with_path(params)[0]
    names = [jax.tree_util.keystr(path) for path, _ in paths]
    for place, grad, param in zip(names, found, leaves, strict=True):
        name = f"grads{place}"
        if grad.shape != param.shape:
            raise ValueError(f"{name} has the shape {grad.shape}; expected {param.shape}")
        if grad.dtype != param.dtype:
            raise TypeError(f"{name} is {grad.dtype}; expected {param.dtype}")
        check_not_sharded(name, grad)
        check_added_up(name, grad, param)
    return Leaves(names, leaves, found)
