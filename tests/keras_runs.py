"""Cases and runs of Keras's optimizers, on any of its backends."""

from __future__ import annotations

import itertools
import os
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("KERAS_BACKEND", "torch")
keras: Any = pytest.importorskip("keras", reason="keras isn't installed")
BACKEND = keras.config.backend()

import fusedopt.keras  # noqa: E402

fused: Any = fusedopt.keras
NAMES = ["Adam", "AdamW", "Nadam", "RMSprop", "SGD"]
SHAPES = [(4, 5), (7,), (), (3, 300)]
CASES = [
    ("Adam", {}),
    ("Adam", {"weight_decay": 0.1, "learning_rate": 0.1}),
    ("Adam", {"amsgrad": True, "epsilon": 1e-2, "beta_1": 0.5}),
    ("AdamW", {}),
    ("AdamW", {"amsgrad": True, "beta_2": 0.9, "epsilon": 0.1}),
    ("Nadam", {}),
    ("Nadam", {"weight_decay": 0.1, "epsilon": 0.1}),
    ("RMSprop", {}),
    ("RMSprop", {"centered": True, "rho": 0.5, "epsilon": 1e-3}),
    ("RMSprop", {"momentum": 0.9, "weight_decay": 0.1, "epsilon": 0.1}),
    ("RMSprop", {"momentum": 0.5, "centered": True, "epsilon": 1e-2}),
    ("SGD", {}),
    ("SGD", {"momentum": 0.9}),
    ("SGD", {"momentum": 0.9, "nesterov": True}),
    ("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "global_clipnorm": 2.0}),
    ("SGD", {"weight_decay": 0.1, "momentum": 0.5}),
]


def with_each(*values: Any) -> list[Any]:
    """Cases with a value. All pairs on torch; a pair for each case elsewhere, where it compiles."""
    if BACKEND == "torch":
        return [(*case, value) for case in CASES for value in values]
    return [(*case, value) for case, value in zip(CASES, itertools.cycle(values))]


each_case = pytest.mark.parametrize(("name", "options"), CASES, ids=str)
each_name = pytest.mark.parametrize("name", NAMES)


def own_class(name: str) -> Any:
    return getattr(keras.optimizers, name)


def fused_class(name: str) -> Any:
    return getattr(fused, f"Fused{name}")


def make_variables(dtype: str = "float32") -> list[Any]:
    rng = np.random.default_rng(0)
    names = ["kernel", "bias", "scalar", "embedding"]
    return [
        keras.Variable(rng.standard_normal(shape).astype("float32"), dtype=dtype, name=name)
        for shape, name in zip(SHAPES, names)
    ]


def make_arrays(variables: list[Any], seed: int, scale: float = 3.0) -> list[Any]:
    """Gradients as arrays of float32."""
    rng = np.random.default_rng(seed + 1)
    return [np.float32(rng.standard_normal(it.shape) * scale) for it in variables]


def make_grads(
    variables: list[Any], seed: int, scale: float = 3.0, bad: float | None = None
) -> list[Any]:
    """Gradients as tensors of the backend; `bad` is written to one element of the second."""
    arrays = make_arrays(variables, seed, scale)
    if bad is not None:
        arrays[1][3] = bad
    return [
        keras.ops.convert_to_tensor(array, dtype=variable.dtype)
        for array, variable in zip(arrays, variables)
    ]


def saved(optimizer: Any) -> list[Any]:
    """The arrays that a saved model has of the optimizer."""
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return [it.numpy() for it in optimizer._variables] + saved(optimizer.inner_optimizer)
    store: dict[str, Any] = {}
    optimizer.save_own_variables(store)
    return [np.array(store[str(index)]) for index in range(len(store))]


def numbers_of(optimizer: Any, variables: list[Any]) -> list[Any]:
    values = [np.array(keras.ops.convert_to_numpy(it.value)) for it in variables]
    return [*values, *saved(optimizer)]


def run(optimizer: Any, variables: list[Any], steps: int = 7) -> list[Any]:
    for step in range(steps):
        optimizer.apply(make_grads(variables, step), variables)
    return numbers_of(optimizer, variables)


def take_step(optimizer: Any, grads: list[Any], variables: list[Any]) -> None:
    """`apply` as Keras's loop has it: on JAX, Keras's own loss scaling can't do without."""
    if BACKEND != "jax":
        optimizer.apply(grads, variables)
        return
    if not optimizer.built:
        optimizer.build(variables)
    values = [[it.value for it in kept] for kept in (optimizer.variables, variables)]
    new_values, new_state = optimizer.stateless_apply(values[0], grads, values[1])
    for variable, value in zip((*variables, *optimizer.variables), (*new_values, *new_state)):
        variable.assign(value)


def assert_same_bits(actual: list[Any], expected: list[Any]) -> None:
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected):
        np.testing.assert_array_equal(a, b, strict=True)


def assert_close(actual: list[Any], expected: list[Any]) -> None:
    """Within some roundings; clipping differs by torch's 1e-6 beside the norm."""
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5, strict=True)
