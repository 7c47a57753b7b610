"""The sides of the comparison under JAX: programs that take several steps of AdamW, clipped.

Every side has parameters and a state of its own, and gives them away to its program, so that it may
work in place.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

from benchmarks.cases import Case
from benchmarks.peers import OURS, Unavailable, load
from benchmarks.timing import Step

STEPS = 4  # in one program
LIMIT = 1.0

# From parameters, gradients and a state to new parameters and a new state.
JaxStep = Callable[[Any, Any, Any], tuple[Any, Any]]


def ours(case: Case) -> tuple[Any, JaxStep]:
    optimizer = _adamw("fusedopt.jax", case, max_grad_norm=LIMIT)
    return optimizer.init, optimizer.step


def our_update(case: Case) -> tuple[Any, JaxStep]:
    return _by_protocol(_adamw("fusedopt.jax", case, max_grad_norm=LIMIT))


def optax(case: Case) -> tuple[Any, JaxStep]:
    return _by_protocol(_optax(case))


def optax_if_finite(case: Case) -> tuple[Any, JaxStep]:
    library = load("optax")
    return _by_protocol(library.apply_if_finite(_optax(case), 2**31 - 1))


JAX_SIDES: Mapping[str, Callable[[Case], tuple[Any, JaxStep]]] = {
    OURS: ours,
    "fusedopt, update": our_update,
    "optax": optax,
    "optax, apply_if_finite": optax_if_finite,
}


def make_program(side: str, case: Case) -> Step:
    """A program of `STEPS` steps of a side. The call returns when it is done.

    Raises:
        Unavailable: JAX, optax or the compiled kernels are missing.
    """
    jax, jnp, np = load("jax"), load("jax.numpy"), load("numpy")
    try:
        init, step = JAX_SIDES[side](case)
    except ImportError as error:  # the kernels are not compiled
        raise Unavailable(str(error)) from error
    draw = np.random.default_rng(0).standard_normal
    size = sum(map(prod, case.shapes))
    params, grads = (_split(jnp, case, draw(size, dtype=np.float32)) for _ in range(2))

    def steps(params: Any, state: Any, grads: Any) -> Any:
        def one(index: Any, now: Any) -> Any:
            # Else XLA would measure the same gradients only once.
            fresh, _ = jax.lax.optimization_barrier((grads, index))
            return step(now[0], fresh, now[1])

        return jax.lax.fori_loop(0, STEPS, one, (params, state))

    program = jax.jit(steps, donate_argnums=(0, 1))
    now = params, init(params)
    try:
        now = program(*now, grads)
    except ImportError as error:  # the custom call is not compiled
        raise Unavailable(str(error)) from error

    def run() -> None:
        nonlocal now
        now = jax.block_until_ready(program(*now, grads))

    return run


def _adamw(library: str, case: Case, **options: Any) -> Any:
    recipe = case.recipe.options
    return load(library).adamw(recipe["lr"], weight_decay=recipe["weight_decay"], **options)


def _optax(case: Case) -> Any:
    return load("optax").chain(load("optax").clip_by_global_norm(LIMIT), _adamw("optax", case))


def _by_protocol(optimizer: Any) -> tuple[Any, JaxStep]:
    def step(params: Any, grads: Any, state: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(grads, state, params)
        return load("optax").apply_updates(params, updates), state

    return optimizer.init, step


def _split(jnp: Any, case: Case, numbers: Any) -> list[Any]:
    """The numbers as the arrays of a case."""
    arrays, begin = [], 0
    for shape in case.shapes:
        arrays.append(jnp.array(numbers[begin : begin + prod(shape)].reshape(shape)))
        begin += prod(shape)
    return arrays
