"""`fusedopt.jax` within optax's wrappers gives what optax's own optimizers give there."""

from __future__ import annotations

from typing import Any

import pytest

jax: Any = pytest.importorskip("jax", reason="jax isn't installed")
optax: Any = pytest.importorskip("optax", reason="optax isn't installed")
np: Any = pytest.importorskip("numpy")

from fusedopt.core import extension  # noqa: E402

if extension.library_in(extension.PACKAGE, "jax") is None:
    pytest.skip("the custom call is not compiled", allow_module_level=True)

import fusedopt.jax  # noqa: E402

jnp: Any = jax.numpy
LABELS = {"w": "slow", "b": "fast"}


def schedule(count: Any) -> Any:
    return 0.1 / (1 + count)


WRAPPED = {
    "chain": lambda it: optax.chain(optax.clip(0.5), it.adam(0.1), optax.scale(0.5)),
    "multi_transform": lambda it: optax.multi_transform(
        {"slow": it.adamw(0.01), "fast": it.sgd(0.1, momentum=0.9)}, LABELS
    ),
    "masked": lambda it: optax.masked(it.nadam(0.1), {"w": True, "b": False}),
    "apply_if_finite": lambda it: optax.apply_if_finite(it.adamw(0.1), 3),
    "inject_hyperparams": lambda it: optax.inject_hyperparams(it.adamw)(schedule, weight_decay=0.1),
    "injected nadam": lambda it: optax.inject_hyperparams(it.nadam)(0.1, b1=0.8),
    "injected rmsprop": lambda it: optax.inject_hyperparams(it.rmsprop)(schedule, momentum=0.9),
    "MultiSteps": lambda it: optax.MultiSteps(it.adam(0.1), every_k_schedule=2),
    "skip_not_finite": lambda it: optax.MultiSteps(
        it.adam(0.1), 2, should_skip_update_fn=optax.skip_not_finite
    ),
    "conditionally_transform": lambda it: optax.conditionally_transform(
        it.sgd(0.1), lambda count: count % 2 == 0
    ),
    "lookahead": lambda it: optax.lookahead(it.sgd(0.1), sync_period=2, slow_step_size=0.5),
}


def run(optimizer: Any, steps: int = 6) -> list[Any]:
    """The parameters after every step."""
    params = {"w": jnp.linspace(-1, 1, 12).reshape(3, 4), "b": jnp.ones(4)}
    looks = isinstance(optimizer.init(params), optax.LookaheadState)
    if looks:
        params = optax.LookaheadParams.init_synced(params)
    state, found = optimizer.init(params), []

    @jax.jit
    def step(params, grads, state):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for seed in range(steps):
        fast = params.fast if looks else params
        draw = np.random.default_rng(seed).normal
        grads = {name: jnp.asarray(draw(size=it.shape), it.dtype) for name, it in fast.items()}
        params, state = step(params, grads, state)
        found.append(params)
    return found


@pytest.mark.parametrize("name", WRAPPED)
def test_wrappers_of_optax(name):
    ours, theirs = run(WRAPPED[name](fusedopt.jax)), run(WRAPPED[name](optax))
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["apply_if_finite", "skip_not_finite"])
def test_wrappers_that_look_for_nan_find_it(name):
    for library in (fusedopt.jax, optax):
        optimizer = WRAPPED[name](library)
        params = {"w": jnp.ones(3), "b": jnp.ones(3)}
        grads = {"w": jnp.full(3, jnp.nan), "b": jnp.ones(3)}
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        assert not any(it.any() for it in jax.tree.leaves(updates))


@pytest.mark.parametrize(("name", "options"), [("adam", {}), ("sgd", {"momentum": 0.9})])
def test_updates_are_exact_where_nothing_decays(name, options):
    """So that adding them gives the bits of a step; they don't need the parameters."""
    optimizer = getattr(fusedopt.jax, name)(0.1, **options, max_grad_norm=1.0)
    draw = np.random.default_rng(0).normal
    params, grads = ({"w": jnp.asarray(draw(size=99), jnp.float32)} for _ in range(2))
    expected, _ = optimizer.step(params, grads, optimizer.init(params))
    updates, _ = optimizer.update(grads, optimizer.init(params))
    assert (optax.apply_updates(params, updates)["w"] == expected["w"]).all()


def test_clipping_is_that_of_optax_and_stays_finite():
    ours = fusedopt.jax.sgd(1.0, max_grad_norm=1.0)
    theirs = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0))
    params = {"w": jnp.zeros(3), "b": jnp.zeros(4)}
    for scale, equal in ((0.1, True), (100.0, True), (1e30, False)):
        grads = jax.tree.map(lambda it, scale=scale: jnp.full_like(it, scale), params)
        actual, _ = ours.update(grads, ours.init(params), params)
        expected, _ = theirs.update(grads, theirs.init(params), params)
        close = np.allclose(actual["w"], expected["w"], rtol=1e-5)
        assert close == equal
        norm = float(optax.tree.norm(actual))
        assert norm <= 1.00001 and (scale < 1 or norm > 0.999)
