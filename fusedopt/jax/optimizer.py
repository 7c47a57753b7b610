"""What the functions of `fusedopt.jax` return."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fusedopt.core.nonfinite import check_choice, check_limit, mode_of
from fusedopt.jax.checks import check_leaves, check_params
from fusedopt.jax.formula import Formula, is_traced
from fusedopt.jax.ranks import all_varying, spread, varying
from fusedopt.jax.step import State, call, sizes_by_dtype

Mask = Any  # a tree of bools, or a function from parameters to one


class Optimizer(NamedTuple):
    """What the functions of `fusedopt.jax` return; optax takes it for one of its transformations.

    Attributes:
        init: `init(params)` returns the first `State`.
        update: `update(grads, state, params)` is optax's protocol: it returns differences to add
            to the parameters, and the new state. It takes more passes over memory than `step`.
            `params` may be left out without weight decay.
        step: `step(params, grads, state)` returns the new parameters and the new state. Inside
            `jax.jit` with `params` and `state` donated, it changes them in place.
    """

    init: Callable[[Any], State]
    update: Callable[..., tuple[Any, State]]
    step: Callable[[Any, Any, State], tuple[Any, State]]


def skips(max_grad_norm: Any, nonfinite: str | None) -> bool:
    """Whether a step is skipped if a gradient holds inf or nan.

    Raises:
        ValueError: one of the arguments is refused.
    """
    if not is_traced(max_grad_norm):
        check_limit("max_grad_norm", max_grad_norm)
    mode = check_choice("nonfinite", nonfinite, ("skip", "propagate"))
    return mode_of(mode, max_grad_norm) == "skip"


def make_optimizer(formula: Formula, mask: Mask | None = None) -> Optimizer:
    """`mask`: the parameters in the formula's first group; the others are in the second."""
    used = formula.used()  # refuses options that are out of range

    def init(params: Any) -> State:
        leaves = check_params(params)
        sizes, axes = sizes_by_dtype(leaves), all_varying(leaves)
        first = {**dict.fromkeys(used, 0.0), **dict(formula.first_values)}
        moments = {
            name: {it: spread(jnp.full(sizes[it], first[name], it), axes) for it in sizes}
            for name in used
        }
        zero = jnp.zeros((), jnp.int32)
        return State(zero, moments, jnp.array(zero), jnp.zeros((), jnp.float32))

    def step(params: Any, grads: Any, state: State) -> tuple[Any, State]:
        leaves = check_leaves(params, grads)
        new, state = call(formula, _groups(mask, params), leaves, state)
        return jax.tree.unflatten(jax.tree.structure(params), new), state

    def update(grads: Any, state: State, params: Any = None, **_: Any) -> tuple[Any, State]:
        if not formula.decays():  # then the differences don't depend on the parameters
            like = grads if params is None else params
            check_leaves(like, grads)
            return step(jax.tree.map(_zeros_like, like), grads, state)
        if params is None:
            raise ValueError(
                "update() needs params to decay; expected update(grads, state, params)"
            )
        new, state = step(params, grads, state)
        return jax.tree.map(jnp.subtract, new, params), state

    return Optimizer(init, update, step)


def _zeros_like(array: jax.Array) -> jax.Array:
    return spread(jnp.zeros(array.shape, array.dtype), varying(array))


def _groups(mask: Mask | None, params: Any) -> Sequence[int]:
    """The group of each leaf. The mask may stand for whole branches of the tree."""
    chosen = mask(params) if callable(mask) else True if mask is None else mask
    return [0 if it else 1 for it in jax.tree.leaves(jax.tree.broadcast(chosen, params))]
