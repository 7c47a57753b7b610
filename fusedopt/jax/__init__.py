"""The compiled step for JAX on the CPU: optax's names, in place inside `jax.jit`.

    optimizer = fusedopt.jax.adamw(1e-3, max_grad_norm=1.0)
    state = optimizer.init(params)
    params, state = optimizer.step(params, grads, state)  # in jax.jit, both of them donated

`optimizer.update` is optax's protocol. It needs JAX, and no torch.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fusedopt.core.nonfinite import check_choice, check_limit
from fusedopt.jax.checks import check_grads, check_params
from fusedopt.jax.optax_state import from_optax, to_optax
from fusedopt.jax.step import Formula, State, call, sizes_by_dtype

__all__ = ["Optimizer", "State", "adam", "adamw", "from_optax", "sgd", "to_optax"]

Rate = float | jax.Array | Callable[[jax.Array], Any]
Mask = Any  # a tree of bools, or a function from parameters to one


class Optimizer(NamedTuple):
    """What `adam`, `adamw` and `sgd` return; optax takes it for one of its transformations.

    Attributes:
        init: `init(params)` returns the first `State`.
        update: `update(grads, state, params)` is optax's protocol: it returns differences to add
            to the parameters, and the new state. The step is computed on copies, so that it takes
            more passes over memory than `step`.
        step: `step(params, grads, state)` returns the new parameters and the new state. Inside
            `jax.jit` with `params` and `state` donated, it changes them in place.
    """

    init: Callable[[Any], State]
    update: Callable[..., tuple[Any, State]]
    step: Callable[[Any, Any, State], tuple[Any, State]]


def adam(
    learning_rate: Rate,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    max_grad_norm: float | None = None,
    nonfinite: str | None = None,
) -> Optimizer:
    """`optax.adam` as one step; see `adamw` for the arguments."""
    options = {"betas": (b1, b2), "eps": eps}
    return _optimizer("adam", (options,), learning_rate, None, max_grad_norm, nonfinite)


def adamw(
    learning_rate: Rate,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    weight_decay: float = 1e-4,
    mask: Mask | None = None,
    max_grad_norm: float | None = None,
    nonfinite: str | None = None,
) -> Optimizer:
    """`optax.adamw` as one step.

    Args:
        learning_rate: a number, an array, or a schedule: a function of the count of steps.
        b1, b2: decay rates of the averages of the gradient and of its square.
        eps: added to the root.
        weight_decay: the parameter is multiplied by 1 - learning_rate * weight_decay.
        mask: a tree of bools, or a function that makes one of the parameters: where it is False,
            a parameter doesn't decay.
        max_grad_norm: all gradients are clipped by one factor if their global L2 norm is larger.
            The norm is measured without overflow.
        nonfinite: "skip" changes nothing if a gradient holds inf or nan, "propagate" updates
            regardless. None is "skip" with `max_grad_norm`, else "propagate".

    Raises:
        ImportError: the kernels, or the custom call, are not compiled.
        TypeError, ValueError: an option, a parameter or a gradient is refused.
    """
    options = {"betas": (b1, b2), "eps": eps, "decoupled_weight_decay": 1.0}
    both = ({**options, "weight_decay": weight_decay}, options)
    return _optimizer("adam", both, learning_rate, mask, max_grad_norm, nonfinite)


def sgd(
    learning_rate: Rate,
    momentum: float | None = None,
    nesterov: bool = False,
    *,
    max_grad_norm: float | None = None,
    nonfinite: str | None = None,
) -> Optimizer:
    """`optax.sgd` as one step; see `adamw` for the arguments."""
    options = {"momentum": momentum or 0.0, "nesterov": float(nesterov and bool(momentum))}
    return _optimizer("sgd", (options,), learning_rate, None, max_grad_norm, nonfinite)


def _optimizer(
    rule: str,
    options: tuple[dict[str, Any], ...],
    learning_rate: Rate,
    mask: Mask | None,
    max_grad_norm: float | None,
    nonfinite: str | None,
) -> Optimizer:
    check_limit("max_grad_norm", max_grad_norm)
    check_choice("nonfinite", nonfinite, ("skip", "propagate"))
    skips = nonfinite == "skip" or (nonfinite is None and max_grad_norm is not None)
    formula = Formula(rule, options, learning_rate, max_grad_norm, skips)
    used = formula.used()  # refuses options that are out of range

    def init(params: Any) -> State:
        leaves = check_params(params)
        sizes = sizes_by_dtype(leaves)
        moments = {name: {key: jnp.zeros(sizes[key], key) for key in sizes} for name in used}
        zero = jnp.zeros((), jnp.int32)
        return State(zero, moments, jnp.array(zero), jnp.zeros((), jnp.float32))

    def step(params: Any, grads: Any, state: State) -> tuple[Any, State]:
        leaves, structure = check_params(params), jax.tree.structure(params)
        chosen = mask(params) if callable(mask) else mask
        decays = [True] * len(leaves) if chosen is None else structure.flatten_up_to(chosen)
        groups = [0 if decay else 1 for decay in decays]
        new, state = call(formula, groups, leaves, check_grads(grads, params), state)
        return jax.tree.unflatten(structure, new), state

    def update(grads: Any, state: State, params: Any = None, **_: Any) -> tuple[Any, State]:
        if params is None:
            raise ValueError("update() needs params; expected update(grads, state, params)")
        new, state = step(params, grads, state)
        return jax.tree.map(jnp.subtract, new, params), state

    return Optimizer(init, update, step)
