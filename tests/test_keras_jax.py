"""Keras on JAX: inside the program of Keras's loop, a step is in place."""

from __future__ import annotations

import time

import numpy as np
import pytest
from keras_runs import (
    BACKEND,
    CASES,
    assert_same_bits,
    fused_class,
    keras,
    make_grads,
    make_variables,
    numbers_of,
)

if BACKEND != "jax":
    pytest.skip("KERAS_BACKEND is another", allow_module_level=True)

import jax

from fusedopt.keras import jax_step

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy")


def compiled(optimizer, variables, grads):
    """The program of a step, with its state in the order of Keras's loop, and the state."""

    def step(state, grads):
        return optimizer.stateless_apply(state[1], grads, state[0])

    state = tuple([it.value for it in kept] for kept in (variables, optimizer.variables))
    return jax.jit(step, donate_argnums=0).lower(state, grads).compile(), state


def copied(program):
    lines = program.as_text().splitlines()
    return [line for line in lines if " copy(" in line and "[] copy(" not in line]


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_no_array_is_copied(name, options):
    variables = make_variables()
    optimizer = fused_class(name)(**{**options, "global_clipnorm": 2.0})
    optimizer.build(variables)
    program, state = compiled(optimizer, variables, make_grads(variables, 0))
    assert not copied(program)
    state = program(state, make_grads(variables, 0))  # the first arrays may be NumPy's memory
    before = [it.unsafe_buffer_pointer() for it in jax.tree.leaves(state) if it.ndim > 0]
    state = program(state, make_grads(variables, 1))
    assert before == [it.unsafe_buffer_pointer() for it in jax.tree.leaves(state) if it.ndim > 0]


CLIPPED = {"global_clipnorm": 1.0}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("AdamW", CLIPPED),
        ("Nadam", {**CLIPPED, "loss_scale_factor": 8.0}),
        ("RMSprop", {"momentum": 0.9}),
        ("SGD", {"nonfinite": "skip"}),
    ],
    ids=str,
)
def test_calls_that_share_a_step_have_the_bits_of_one_call(name, options, monkeypatch):
    results = []
    for largest in (4, 3, 1):
        monkeypatch.setattr(jax_step, "MAX_VARIABLES", largest)
        optimizer, variables = fused_class(name)(**options), make_variables()
        for seed, bad in enumerate((None, np.nan, None)):
            optimizer.apply(make_grads(variables, seed, bad=bad), variables)
        readings = [np.array(it.value) for it in optimizer._backend.variables]
        results.append([*numbers_of(optimizer, variables), *readings])
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


def test_a_thousand_variables_compile_in_seconds():
    """In seconds of the processor: one call over all of them took more than a minute."""
    variables = [keras.Variable(np.ones(8, np.float32)) for _ in range(1000)]
    optimizer = fused_class("AdamW")(1e-3, **CLIPPED)
    optimizer.build(variables)
    start = time.process_time()
    program, _ = compiled(optimizer, variables, make_grads(variables, 0))
    assert time.process_time() - start < 20
    assert not copied(program)
