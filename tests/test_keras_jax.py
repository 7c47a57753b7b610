"""Keras on JAX: inside the program of Keras's loop, a step is in place."""

from __future__ import annotations

import pytest
from keras_runs import BACKEND, CASES, fused_class, make_grads, make_variables

if BACKEND != "jax":
    pytest.skip("KERAS_BACKEND is another", allow_module_level=True)

import jax


def compiled(optimizer, variables, grads):
    """The program of a step, with its state in the order of Keras's loop, and the state."""

    def step(state, grads):
        return optimizer.stateless_apply(state[1], grads, state[0])

    state = tuple([it.value for it in kept] for kept in (variables, optimizer.variables))
    return jax.jit(step, donate_argnums=0).lower(state, grads).compile(), state


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_no_array_is_copied(name, options):
    variables = make_variables()
    optimizer = fused_class(name)(**{**options, "global_clipnorm": 2.0})
    optimizer.build(variables)
    program, state = compiled(optimizer, variables, make_grads(variables, 0))
    lines = program.as_text().splitlines()
    copies = [line for line in lines if " copy(" in line and "[] copy(" not in line]
    assert not copies
    state = program(state, make_grads(variables, 0))  # the first arrays may be NumPy's memory
    before = [it.unsafe_buffer_pointer() for it in jax.tree.leaves(state) if it.ndim > 0]
    state = program(state, make_grads(variables, 1))
    assert before == [it.unsafe_buffer_pointer() for it in jax.tree.leaves(state) if it.ndim > 0]
