"""The sides of the comparison under Keras: clipped steps of AdamW.

KERAS_BACKEND names the backend. On JAX, a step is a program that is given its state. On TensorFlow,
it is a `tf.function`; that needs an environment that has TensorFlow and torch.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.cases import Case
from benchmarks.peers import OURS, Unavailable, load
from benchmarks.timing import Step

BACKEND = os.environ.get("KERAS_BACKEND", "torch")
XLA = "keras, jit_compile=True"

KERAS_SIDES: Mapping[str, Callable[[], Any]] = {
    OURS: lambda: load("fusedopt.keras").FusedAdamW,
    "keras": lambda: load("keras").optimizers.AdamW,
}
if BACKEND == "tensorflow":
    KERAS_SIDES = {**KERAS_SIDES, XLA: KERAS_SIDES["keras"]}


def make_keras_step(side: str, case: Case) -> Step:
    """A step of a side. The call returns when it is done.

    Raises:
        Unavailable: Keras, its backend or the compiled kernels are missing.
    """
    os.environ["KERAS_BACKEND"] = BACKEND
    keras, np = load("keras"), load("numpy")
    try:
        cls = KERAS_SIDES[side]()
    except ImportError as error:
        raise Unavailable(str(error)) from error
    rng, recipe = np.random.default_rng(0), case.recipe.options
    arrays = [rng.standard_normal(shape, dtype=np.float32) for shape in case.shapes]
    variables = [keras.Variable(array) for array in arrays]
    grads = [keras.ops.convert_to_tensor(array * 0.01) for array in arrays]
    optimizer = cls(recipe["lr"], weight_decay=recipe["weight_decay"], global_clipnorm=1.0)
    optimizer.build(variables)
    if keras.config.backend() == "jax":
        return _program(optimizer, variables, grads)
    if keras.config.backend() == "tensorflow":
        function = load("tensorflow").function(jit_compile=side == XLA)
        return function(lambda: optimizer.apply(grads, variables))
    return lambda: optimizer.apply(grads, variables)


def _program(optimizer: Any, variables: list[Any], grads: list[Any]) -> Step:
    jax = load("jax")

    def step(state: Any, grads: Any) -> Any:
        return optimizer.stateless_apply(state[1], grads, state[0])

    program = jax.jit(step, donate_argnums=0)
    state: Any = tuple([it.value for it in kept] for kept in (variables, optimizer.variables))

    def run() -> None:
        nonlocal state
        state = jax.block_until_ready(program(state, grads))

    return run
