"""`fusedopt.jax`: the reference's bits, in place; optax's results, protocol and states."""

from __future__ import annotations

import math
import re
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import same_bits

import fusedopt

jax: Any = pytest.importorskip("jax", reason="jax isn't installed")
optax: Any = pytest.importorskip("optax", reason="optax isn't installed")
np: Any = pytest.importorskip("numpy")

from fusedopt.core import extension  # noqa: E402

if extension.library_in(extension.PACKAGE, "jax") is None:
    pytest.skip("the custom call is not compiled", allow_module_level=True)

import fusedopt.jax  # noqa: E402

jnp: Any = jax.numpy
ROOT = Path(__file__).resolve().parent.parent
SHAPES = {"kernel": (33, 41), "bias": (7,), "scalar": (), "long": (16385,), "none": (0,)}
CASES = [
    ("adam", {"b1": 0.5, "eps": 1e-3}, fusedopt.FusedAdam, {"betas": (0.5, 0.999), "eps": 1e-3}),
    ("adamw", {"weight_decay": 0.1}, fusedopt.FusedAdamW, {"weight_decay": 0.1}),
    ("sgd", {}, fusedopt.FusedSGD, {}),
    ("sgd", {"momentum": 0.9}, fusedopt.FusedSGD, {"momentum": 0.9}),
    (
        *("sgd", {"momentum": 0.9, "nesterov": True}, fusedopt.FusedSGD),
        {"momentum": 0.9, "nesterov": True},
    ),
    (
        *("nadam", {"b1": 0.5, "eps": 1e-3}, fusedopt.FusedNAdam),
        {"betas": (0.5, 0.999), "eps": 1e-3, "momentum_decay": math.inf},
    ),
    (
        *("nadamw", {"weight_decay": 0.1}, fusedopt.FusedNAdam),
        {"weight_decay": 0.1, "decoupled_weight_decay": True, "momentum_decay": math.inf},
    ),
    ("rmsprop", {}, fusedopt.FusedRMSprop, {"alpha": 0.9, "eps_in_sqrt": True}),
    (
        *("rmsprop", {"eps_in_sqrt": False, "centered": True, "momentum": 0.9}),
        fusedopt.FusedRMSprop,
        {"alpha": 0.9, "centered": True, "momentum": 0.9, "lr_in_momentum": True},
    ),
]
STEPS = [("plain", 1.0), ("nan", 1.0), ("large", 1e30), ("plain", 0.1)]


def make(name: str, **options: Any) -> fusedopt.jax.Optimizer:
    return getattr(fusedopt.jax, name)(**options)


def make_tree(seed: int, dtype: str = "float32", scale: float = 1.0) -> Any:
    """In "mixed", the first leaf is float32, whose name sorts after that of the others' dtype."""
    draw = np.random.default_rng(seed).normal
    dtypes = dict.fromkeys(SHAPES, dtype)
    if dtype == "mixed":
        dtypes = {**dict.fromkeys(SHAPES, "bfloat16"), "bias": "float32"}
    return {name: jnp.asarray(draw(0, scale, it), dtypes[name]) for name, it in SHAPES.items()}


def tensor_of(array: Any) -> torch.Tensor:
    array = np.array(array)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def gradients(dtype: str) -> list[Any]:
    found = []
    for seed, (kind, scale) in enumerate(STEPS):
        tree = make_tree(seed + 1, dtype, 1e4 if dtype == "float16" and kind == "large" else scale)
        if kind == "nan":
            tree["bias"] = tree["bias"].at[3].set(jnp.nan)
        found.append(tree)
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "mixed"])
@pytest.mark.parametrize("case", CASES, ids=lambda it: f"{it[0]}({it[1]})")
def test_the_bits_of_the_reference(case, dtype):
    """A skipped step changes nothing; gradients of 1e30 are clipped."""
    name, options, cls, torch_options = case
    tree = make_tree(0, dtype)
    params = {key: torch.nn.Parameter(tensor_of(tree[key])) for key in sorted(tree)}
    group = {"params": [*params.values()], **torch_options}
    reference = cls([group], lr=0.01, max_grad_norm=0.5, backend="reference")
    optimizer = make(name, learning_rate=0.01, **options, max_grad_norm=0.5)
    step, state = jax.jit(optimizer.step), optimizer.init(tree)
    for grads in gradients(dtype):
        for key, param in params.items():
            param.grad = tensor_of(grads[key])
        reference.step()
        tree, state = step(tree, grads, state)
        assert all(same_bits(tensor_of(tree[key]), params[key].detach()) for key in params)
        assert same_bits(tensor_of(state.grad_norm), reference.grad_norm)
        assert int(state.skips) == int(reference.skipped_steps)
    assert int(state.count) == 3
    for key, moments in state.moments.items():
        for flat in map(tensor_of, moments.values()):
            parts = [reference.state[it][key].ravel() for it in params.values()]
            assert same_bits(flat, torch.cat([it for it in parts if it.dtype == flat.dtype]))


def pointers(tree: Any) -> list[int]:
    return [it.unsafe_buffer_pointer() for it in jax.tree.leaves(tree)]


@pytest.mark.parametrize("case", CASES, ids=lambda it: f"{it[0]}({it[1]})")
def test_donated_arrays_are_changed_where_they_are(case):
    optimizer = make(case[0], learning_rate=0.01, **case[1], max_grad_norm=1.0)
    params, grads = ({**make_tree(seed), "none": jnp.ones(1)} for seed in range(2))
    state = optimizer.init(params)
    step = jax.jit(optimizer.step, donate_argnums=(0, 2))
    text = step.lower(params, grads, state).compile().as_text()
    assert "fusedopt_jax_step" in text and not re.search(r"\bcopy(-start)?\(", text)
    before = pointers(params), pointers(state.moments)
    params, state = step(params, grads, state)
    assert (pointers(params), pointers(state.moments)) == before


def test_steps_are_lowered_for_gpus_too():
    """Nothing runs there in these tests: tests/test_enqueued_steps.py emulates what is called."""
    optimizer = fusedopt.jax.adamw(1e-3, max_grad_norm=1.0)
    params = {"a": jnp.ones((3, 4)), "b": jnp.ones(5)}
    arguments = params, params, optimizer.init(params)
    traced = jax.jit(optimizer.step).trace(*arguments)
    assert "@fusedopt_jax_step" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_compile_time_of_1000_leaves():
    """XLA compiles results in place ever slower: with moments in trees, this takes minutes."""
    optimizer = fusedopt.jax.adamw(0.01, max_grad_norm=1.0)
    params = {str(it): jnp.ones(64) for it in range(1000)}
    state = optimizer.init(params)
    assert len(jax.tree.leaves(state)) == 5
    lowered = jax.jit(optimizer.step, donate_argnums=(0, 2)).lower(params, params, state)
    begin = time.process_time()
    lowered.compile()
    assert time.process_time() - begin < 20  # 3 s on two cores


def test_arrays_that_are_not_donated_stay_as_they_were():
    optimizer = fusedopt.jax.sgd(0.5, momentum=0.9)
    params, grads = make_tree(0), make_tree(1)
    state = optimizer.init(params)
    for step in (optimizer.step, jax.jit(optimizer.step)):
        new, new_state = step(params, grads, state)
        assert (params["long"] == make_tree(0)["long"]).all() and int(state.count) == 0
        assert not state.moments["momentum_buffer"]["float32"].any()
        assert np.allclose(new["long"], params["long"] - 0.5 * grads["long"], atol=1e-6)
        assert int(new_state.count) == 1


def schedule(count: Any) -> Any:
    return 0.1 / (1 + count)


def mask(params: Any) -> Any:
    return {name: it.ndim > 1 for name, it in params.items()}


OPTAX = [
    ("adam", {"learning_rate": 0.01}),
    ("adam", {"learning_rate": schedule, "b1": 0.8, "b2": 0.9, "eps": 1e-3}),
    ("adamw", {"learning_rate": 0.01, "weight_decay": 0.3, "mask": mask}),
    ("sgd", {"learning_rate": schedule}),
    ("sgd", {"learning_rate": 0.01, "momentum": 0.9, "nesterov": True}),
    ("nadam", {"learning_rate": schedule, "b1": 0.8}),
    ("nadamw", {"learning_rate": 0.01, "weight_decay": 0.3, "mask": mask}),
    ("adamw", {"learning_rate": schedule, "weight_decay": schedule}),
    ("rmsprop", {"learning_rate": schedule, "eps_in_sqrt": False, "initial_scale": 1.0}),
    ("rmsprop", {"learning_rate": 0.01, "eps": 0.0, "centered": True}),
    ("rmsprop", {"learning_rate": schedule, "decay": 0.5, "momentum": 0.9}),
]

OPTAX_IDS = [f"{name}({','.join(options)})-{index}" for index, (name, options) in enumerate(OPTAX)]


def run(optimizer: Any, state: Any, params: Any, seeds: range) -> tuple[Any, Any]:
    """Steps by optax's protocol."""
    for seed in seeds:
        updates, state = optimizer.update(make_tree(seed), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def assert_close(actual: Any, expected: Any) -> None:
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "options"), OPTAX, ids=OPTAX_IDS)
def test_the_results_are_optaxs_also_within_a_chain(name, options):
    theirs = getattr(optax, name)(**options)
    expected, _ = run(theirs, theirs.init(make_tree(0)), make_tree(0), range(1, 5))
    ours = make(name, **options)
    actual, _ = run(ours, ours.init(make_tree(0)), make_tree(0), range(1, 5))
    assert_close(actual, expected)
    chained = optax.chain(optax.scale(1.0), ours)
    assert_close(run(chained, chained.init(make_tree(0)), make_tree(0), range(1, 5))[0], expected)


@pytest.mark.parametrize(("name", "options"), OPTAX, ids=OPTAX_IDS)
def test_states_go_to_optax_and_back(name, options):
    theirs = optax.chain(optax.clip_by_global_norm(1e6), getattr(optax, name)(**options))
    ours = make(name, **options)
    params, state = run(ours, ours.init(make_tree(0)), make_tree(0), range(1, 3))
    converted = fusedopt.jax.to_optax(state, theirs.init(params))
    expected, after = run(theirs, converted, params, range(3, 5))
    assert_close(run(ours, state, params, range(3, 5))[0], expected)
    back = fusedopt.jax.from_optax(ours.init(params), after)
    if name.startswith(("adam", "nadam")) or callable(options["learning_rate"]):
        assert int(back.count) == 4
    both = [run(ours, back, expected, range(5, 7))[0], run(theirs, after, expected, range(5, 7))[0]]
    assert_close(*both)


def test_states_of_another_optimizer_are_refused():
    params = make_tree(0)
    state = fusedopt.jax.adam(0.1).init(params)
    with pytest.raises(ValueError, match="template has no room for exp_avg, exp_avg_sq"):
        fusedopt.jax.to_optax(state, optax.sgd(0.1).init(params))
    with pytest.raises(ValueError, match="optax_state has no exp_avg, exp_avg_sq"):
        fusedopt.jax.from_optax(state, optax.sgd(0.1).init(params))


def test_options_that_are_refused():
    for options, message in (
        ({"b1": 1.0}, r"Invalid betas value: 1; expected a number in \[0, 1\)"),
        ({"max_grad_norm": -1.0}, "Invalid max_grad_norm value: -1.0"),
        ({"nonfinite": "raise"}, "Invalid nonfinite value: 'raise'; expected one of 'skip'"),
    ):
        with pytest.raises(ValueError, match=message):
            make("adam", learning_rate=0.1, **options)
    with pytest.raises(ValueError, match="Invalid lr value: -1"):
        fusedopt.jax.sgd(-1.0)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("adam", {"eps_root": 1e-8}, "Invalid eps_root value: 1e-08; expected 0.0: .*optax.adam"),
        ("adamw", {"mu_dtype": "bfloat16"}, "Invalid mu_dtype value: bfloat16; expected None"),
        ("sgd", {"accumulator_dtype": "float32"}, "Invalid accumulator_dtype value: float32"),
        ("rmsprop", {"bias_correction": True}, r"bias_correction .*use adam\(b1=0.0\)"),
        (
            *("rmsprop", {"momentum": 0.9, "nesterov": True}),
            "Invalid nesterov value: True; expected False: use optax.rmsprop",
        ),
    ],
)
def test_arguments_of_optax_that_the_kernels_lack_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        make(name, **{"learning_rate": 0.1, **options})


def test_arguments_may_be_arrays():
    """As float32 numbers of the program, they are those of Python rounded to float32."""
    numbers = {"learning_rate": 2**-6, "b1": 0.875, "b2": 0.75, "eps": 2**-8, "max_grad_norm": 0.5}
    params, grads = make_tree(0), make_tree(1)
    for name in ("adam", "nadam"):
        optimizer = make(name, **numbers)
        expected = optimizer.step(params, grads, optimizer.init(params))
        expected = optimizer.step(expected[0], grads, expected[1])

        @jax.jit
        def two_steps(values, params, grads, name=name):
            traced = make(name, **values)
            params, state = traced.step(params, grads, traced.init(params))
            return traced.step(params, grads, state)

        actual = two_steps(numbers, params, grads)
        assert all(map(np.array_equal, jax.tree.leaves(actual), jax.tree.leaves(expected)))
    with pytest.raises(Exception, match="Invalid max_grad_norm value: -1; expected a number > 0"):
        jax.block_until_ready(two_steps({**numbers, "max_grad_norm": -1.0}, params, grads))


def test_a_mask_may_stand_for_branches():
    params = {"body": {"w": jnp.ones(3), "b": jnp.ones(3)}, "head": jnp.ones(3)}
    masks = ({"body": False, "head": True}, lambda _: {"body": False, "head": True})
    for chosen in masks:
        optimizer = fusedopt.jax.adamw(0.1, weight_decay=0.5, mask=chosen)
        grads = jax.tree.map(jnp.zeros_like, params)
        new, _ = optimizer.step(params, grads, optimizer.init(params))
        assert (new["body"]["w"] == 1).all() and np.allclose(new["head"], 0.95)


def test_trees_that_are_refused():
    optimizer = fusedopt.jax.adam(0.1)
    params, grads = {"w": jnp.ones(3)}, {"w": jnp.ones(3)}
    state = optimizer.init(params)
    with pytest.raises(TypeError, match=r"params\['w'\] is int32; expected one of float32"):
        optimizer.init({"w": jnp.ones(3, jnp.int32)})
    with pytest.raises(ValueError, match="grads has the structure"):
        optimizer.step(params, {"v": jnp.ones(3)}, state)
    with pytest.raises(ValueError, match=r"grads\['w'\] has the shape \(4,\); expected \(3,\)"):
        optimizer.step(params, {"w": jnp.ones(4)}, state)
    with pytest.raises(TypeError, match=r"grads\['w'\] is bfloat16; expected float32"):
        optimizer.step(params, {"w": jnp.ones(3, jnp.bfloat16)}, state)
    with pytest.raises(ValueError, match="update\\(\\) needs params to decay"):
        fusedopt.jax.adamw(0.1).update(grads, state)
    with pytest.raises(ValueError, match=r"grads\['w'\] has the shape"):
        optimizer.update({"w": jnp.ones(4)}, state, params)
    stacked = jax.tree.map(lambda it: jnp.stack([it, it]), (params, grads, state))
    with pytest.raises(NotImplementedError, match="vmap"):
        jax.vmap(optimizer.step)(*stacked)


def test_a_learning_rate_out_of_range_ends_the_step():
    optimizer = fusedopt.jax.sgd(lambda count: -1.0 + count)
    params = {"w": jnp.ones(3)}
    with pytest.raises(Exception, match="Invalid lr value: -1"):
        jax.block_until_ready(optimizer.step(params, params, optimizer.init(params)))


def test_the_example_learns(monkeypatch, capsys):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(sys, "path", [str(ROOT / "examples"), *sys.path])
    main = runpy.run_path(str(ROOT / "examples/jax_digits.py"))["main"]
    assert main(epochs=10) > 0.85
    assert "2 bad batches skipped" in capsys.readouterr().out
