"""Refuses trees that no step can take. The error names the leaf."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

from typing import Any

import jax

from fusedopt.core import c_library
from fusedopt.jax.formula import is_traced


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
    """
    known = c_library.load().dtypes
    leaves = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        dtype = getattr(getattr(leaf, "dtype", None), "name", type(leaf).__name__)
        if dtype not in known:
            name = jax.tree_util.keystr(path)
            raise TypeError(f"params{name} is {dtype}; expected one of {', '.join(known)}")
        leaves.append(leaf)
    return leaves


def check_grads(grads: Any, params: Any) -> list[jax.Array]:
    """The leaves of the gradients.

    Raises:
        ValueError: the trees differ, or a shape does.
        TypeError: a dtype differs.
    """
    found, structure = jax.tree.flatten(grads)
    if structure != jax.tree.structure(params):
        expected = jax.tree.structure(params)
        raise ValueError(f"grads has the structure {structure}; expected {expected}, as params")
    paths = jax.tree_util.tree_flatten_with_path(params)[0]
    for grad, (path, param) in zip(found, paths, strict=True):
        name = f"grads{jax.tree_util.keystr(path)}"
        if grad.shape != param.shape:
            raise ValueError(f"{name} has the shape {grad.shape}; expected {param.shape}")
        if grad.dtype != param.dtype:
            raise TypeError(f"{name} is {grad.dtype}; expected {param.dtype}")
    return found
