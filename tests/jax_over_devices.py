"""Steps of `fusedopt.jax` over four devices. Prints, as JSON, by check, what came of it.

`tests/test_jax_over_devices.py` runs it: JAX makes more devices of the CPU only in a new process.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import fusedopt.jax
from fusedopt.jax import State

P = PartitionSpec
CHUNK = 16384
SPECS = {"both": P(("x", "y")), "one": P("y"), "whole": P()}
STATE = State(P(), P(("x", "y")), P(), P())
OPTIMIZER = fusedopt.jax.adamw(0.1, weight_decay=0.1, max_grad_norm=1.0)


def make_mesh(kind: AxisType = AxisType.Auto) -> Any:
    return jax.make_mesh((2, 2), ("x", "y"), axis_types=(kind, kind))


MESH = make_mesh()


def make_tree(seed: int) -> dict[str, jax.Array]:
    """Arrays whose shards are whole chunks: so their sums are those of the whole arrays."""
    draw = np.random.default_rng(seed).normal
    shapes = {"both": (4, CHUNK), "one": (2, CHUNK), "whole": (7,)}
    return {name: jnp.asarray(draw(0, 1, it), jnp.float32) for name, it in shapes.items()}


def place(tree: dict[str, jax.Array], mesh: Any = MESH, specs: Any = SPECS) -> dict[str, jax.Array]:
    return {name: jax.device_put(it, NamedSharding(mesh, specs[name])) for name, it in tree.items()}


def copied(tree: dict[str, jax.Array], mesh: Any = MESH) -> dict[str, jax.Array]:
    return place(tree, mesh, dict.fromkeys(tree, P()))


def sharded(
    step: Callable[..., Any], specs: Any = SPECS, state: Any = STATE, **options: Any
) -> Any:
    inside = jax.shard_map(
        step, mesh=MESH, in_specs=(specs, SPECS, state), out_specs=(specs, state), **options
    )
    return jax.jit(inside, donate_argnums=(0, 2))


def init(params: dict[str, jax.Array]) -> State:
    return jax.jit(jax.shard_map(OPTIMIZER.init, mesh=MESH, in_specs=(SPECS,), out_specs=STATE))(
        params
    )


def bits_of_whole_arrays() -> dict[str, Any]:
    """Steps over shards and over whole arrays, with nan in a shard, and with large gradients."""
    expected, params = make_tree(0), place(make_tree(0))
    state, sharded_state = OPTIMIZER.init(expected), init(params)
    step, sharded_step = jax.jit(OPTIMIZER.step), sharded(OPTIMIZER.step)
    found: dict[str, Any] = {"equal": True}
    for seed, scale in ((1, 1.0), (2, float("nan")), (3, 1e30), (4, 1e-3)):
        grads = make_tree(seed)
        grads["both"] = grads["both"].at[3, 5].multiply(scale)
        expected, state = step(expected, grads, state)
        params, sharded_state = sharded_step(params, place(grads), sharded_state)
        pairs = [(expected[name], params[name]) for name in SPECS]
        pairs += [(getattr(state, it), getattr(sharded_state, it)) for it in State._fields[2:]]
        equal = (np.array_equal(*it, equal_nan=True) for it in pairs)
        found["equal"] = found["equal"] and all(equal)
    found["steps"] = [int(sharded_state.count), int(sharded_state.skips)]
    return found


def compiled_text() -> str:
    params = place(make_tree(0))
    lowered = sharded(OPTIMIZER.step).lower(params, place(make_tree(1)), init(params))
    return lowered.compile().as_text()


def protocol_of_optax() -> bool:
    params = place(make_tree(0))
    expected, _ = sharded(OPTIMIZER.step)(params, place(make_tree(1)), init(params))

    def step(params: Any, grads: Any, state: State) -> Any:
        updates, state = OPTIMIZER.update(grads, OPTIMIZER.init(params), params)
        return jax.tree.map(jnp.add, params, updates), state

    params = place(make_tree(0))
    actual, _ = sharded(step)(params, place(make_tree(1)), init(params))
    return all(np.allclose(actual[name], expected[name], atol=1e-6) for name in SPECS)


def copies_on_every_device() -> bool:
    expected, _ = OPTIMIZER.step(make_tree(0), make_tree(1), OPTIMIZER.init(make_tree(0)))
    params, grads = copied(make_tree(0)), copied(make_tree(1))
    actual, _ = jax.jit(OPTIMIZER.step)(params, grads, OPTIMIZER.init(params))
    return all(np.array_equal(actual[name], expected[name]) for name in SPECS)


def take(params: Any, grads: Any, step: Callable[..., Any] = OPTIMIZER.step) -> Any:
    return step(params, grads, OPTIMIZER.init(make_tree(0)))


def with_explicit_axes() -> Any:
    mesh = make_mesh(AxisType.Explicit)
    with jax.set_mesh(mesh):
        return take(place(make_tree(0), mesh), place(make_tree(1), mesh), jax.jit(OPTIMIZER.step))


def grads_that_are_not_added_up() -> Any:
    wrong = {**SPECS, "both": P(), "one": P()}
    params = make_tree(0)
    params = {**params, "both": params["both"][:1], "one": params["one"][:1]}
    step = sharded(OPTIMIZER.step, wrong, State(P(), P(), P(), P()))
    return step(params, make_tree(1), OPTIMIZER.init(params))


def state_of_whole_arrays() -> Any:
    return sharded(OPTIMIZER.step, state=State(P(), P(), P(), P()))(
        make_tree(0), make_tree(1), OPTIMIZER.init(make_tree(0))
    )


def rate_by_rank() -> Any:
    def step(params: Any, grads: Any, state: State) -> Any:
        rate = 0.1 * (1.0 + jax.lax.axis_index("x"))
        return fusedopt.jax.adamw(rate, max_grad_norm=1.0).step(params, grads, state)

    params = place(make_tree(0))
    return sharded(step)(params, place(make_tree(1)), init(params))


def without_check_vma() -> Any:
    params = place(make_tree(0))
    step = sharded(OPTIMIZER.step, check_vma=False)
    return step(params, place(make_tree(1)), init(params))


def over_some_axes() -> Any:
    inside = jax.shard_map(
        take, mesh=MESH, in_specs=P("y"), out_specs=P("y"), axis_names=frozenset({"y"})
    )
    return jax.jit(inside)({"one": jnp.ones((2, 8))}, {"one": jnp.ones((2, 8))})


REFUSED = {
    "step": lambda: take(place(make_tree(0)), place(make_tree(1))),
    "init": lambda: OPTIMIZER.init(place(make_tree(0))),
    "params in jit": lambda: take(
        place(make_tree(0)), copied(make_tree(1)), jax.jit(OPTIMIZER.step)
    ),
    "grads in jit": lambda: take(make_tree(0), place(make_tree(1)), jax.jit(OPTIMIZER.step)),
    "explicit axes": with_explicit_axes,
    "grads not added up": grads_that_are_not_added_up,
    "state of whole arrays": state_of_whole_arrays,
    "rate by rank": rate_by_rank,
    "check_vma": without_check_vma,
    "some axes": over_some_axes,
}


def message_of(run: Callable[[], Any]) -> str:
    try:
        jax.block_until_ready(run())
    except Exception as error:
        return str(error)
    return ""


def main() -> None:
    found = {it.__name__: it() for it in (bits_of_whole_arrays, compiled_text, protocol_of_optax)}
    found["copies_on_every_device"] = copies_on_every_device()
    print(json.dumps(found | {name: message_of(run) for name, run in REFUSED.items()}))


if __name__ == "__main__":
    main()
