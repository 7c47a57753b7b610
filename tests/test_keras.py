"""Keras's own steps; the reference's bits; bad batches. On the backend that KERAS_BACKEND names."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import numpy as np
import pytest
from keras_runs import (
    BACKEND,
    assert_close,
    assert_same_bits,
    each_case,
    each_name,
    fused,
    fused_class,
    keras,
    make_arrays,
    make_grads,
    make_variables,
    numbers_of,
    own_class,
    run,
    saved,
    with_each,
)

from fusedopt.core.nonfinite import NonFiniteGradientError

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy")
on_torch = pytest.mark.skipif(BACKEND != "torch", reason="KERAS_BACKEND is another")
# JAX has float64 only with jax_enable_x64.
DTYPES = ["float32", "bfloat16", "float16", *(["float64"] if BACKEND != "jax" else [])]
COMMON = [
    {},
    {"global_clipnorm": 1.0},
    {"gradient_accumulation_steps": 2, "global_clipnorm": 1.0},
    {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 3},
    {"use_ema": True, "gradient_accumulation_steps": 3, "ema_overwrite_frequency": 2},
    {"loss_scale_factor": 8.0},
    {"loss_scale_factor": 8.0, "gradient_accumulation_steps": 2},
    {"clipnorm": 0.5, "loss_scale_factor": 8.0},
    {"clipvalue": 0.02, "gradient_accumulation_steps": 2},
    {"learning_rate": "schedule"},
]


def options_of(options: dict[str, Any]) -> dict[str, Any]:
    if {"clipnorm", "clipvalue"} & options.keys():  # Keras takes one kind of clipping
        options = {name: it for name, it in options.items() if name != "global_clipnorm"}
    if options.get("learning_rate") != "schedule":
        return options
    return {**options, "learning_rate": keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5)}


@pytest.mark.parametrize(("name", "options", "common"), with_each(*COMMON), ids=str)
def test_a_class_steps_as_keras_own(name, options, common):
    options = options_of({**options, **common})
    own = own_class(name)(**options)
    ours = fused_class(name)(**options)
    expected = run(own, make_variables())
    assert_close(run(ours, make_variables()), expected)


def wide(variable: Any) -> Any:
    return np.array(keras.ops.convert_to_numpy(variable.value), np.float64)


def run_reference(optimizer: Any, variables: list[Any], steps: int) -> list[Any]:
    """The numbers that the reference gives for the steps of `run`."""
    torch: Any = pytest.importorskip("torch", reason="the reference needs torch")
    from fusedopt.keras.torch_backend import CLASSES

    params, dtype = [], getattr(torch, variables[0].dtype)
    for variable in make_variables(variables[0].dtype):
        params.append(torch.nn.Parameter(torch.tensor(wide(variable)).to(dtype)))
    options = {**optimizer._options(), "weight_decay": optimizer.weight_decay or 0.0}
    limit = optimizer.global_clipnorm
    reference = CLASSES[optimizer.rule](
        [{"params": params, **options}], max_grad_norm=limit, backend="reference"
    )
    reference.param_groups[0]["lr"] = float(optimizer.learning_rate)
    for step in range(steps):
        for param, grad in zip(params, make_arrays(variables, step)):
            param.grad = torch.tensor(grad).to(dtype)
        reference.step()
        for state in reference.state.values():  # Keras's one product has the first variable's dtype
            if "mu_product" in state:
                state["mu_product"].copy_(state["mu_product"].to(dtype))
    states = [[reference.state[it][name] for it in params] for name in optimizer._states()]
    return [it.detach().double().numpy() for column in (params, *states) for it in column]


@pytest.mark.parametrize(("name", "options", "dtype"), with_each(*DTYPES), ids=str)
def test_a_step_has_the_bits_of_the_reference(name, options, dtype):
    """On every backend, and so also of every other backend."""
    optimizer = fused_class(name)(**{"global_clipnorm": 1.0, **options})
    variables = make_variables(dtype)
    run(optimizer, variables, 4)
    expected = run_reference(optimizer, variables, 4)
    columns = (variables, *optimizer._states().values())
    assert_same_bits([wide(it) for column in columns for it in column], expected)


@each_name
def test_signature_and_config_are_keras_own(name):
    cls, own = fused_class(name), own_class(name)
    arguments = list(inspect.signature(cls).parameters)
    assert [it for it in arguments if it != "nonfinite"] == list(inspect.signature(own).parameters)
    assert isinstance(cls(), keras.optimizers.Optimizer)
    config = cls(0.5).get_config()
    assert {**config, "name": None} == {**own(0.5).get_config(), "name": None}
    assert cls.from_config(cls(nonfinite="skip").get_config()).nonfinite == "skip"


@pytest.mark.parametrize(
    ("name", "options", "common"),
    with_each({"use_ema": True}, {"loss_scale_factor": 4.0}, {}),
    ids=str,
)
def test_a_nan_batch_changes_nothing(name, options, common):
    options = {"global_clipnorm": 1.0, **options, **common}
    variables, others = make_variables(), make_variables()
    optimizer, other = (fused_class(name)(**options) for _ in range(2))
    for step in range(4):
        optimizer.apply(make_grads(variables, step), variables)
        other.apply(make_grads(variables, step), others)
        optimizer.apply(make_grads(variables, 9, bad=np.nan), variables)
        assert optimizer.step_skipped and int(optimizer.iterations) == step + 1
        assert_same_bits(numbers_of(optimizer, variables), numbers_of(other, others))
    assert optimizer.skipped_steps == 4 and other.skipped_steps == 0


@pytest.mark.parametrize("options", [{"clipnorm": 1.0}, {"clipvalue": 1.0}], ids=str)
@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_clipping_each_gradient_hides_no_bad_batch(options, bad):
    """Of inf, Keras's `clipvalue` makes a number."""
    variables = make_variables()
    optimizer = fused.FusedAdamW(**options, nonfinite="skip")
    optimizer.apply(make_grads(variables, 1), variables)
    before = numbers_of(optimizer, variables)
    optimizer.apply(make_grads(variables, 2, bad=bad), variables)
    assert optimizer.step_skipped
    assert_same_bits(numbers_of(optimizer, variables), before)


@each_name
def test_gradients_of_1e30_are_clipped(name):
    results = []
    for scale in (1e30, 1e3):
        variables = make_variables()
        optimizer = fused_class(name)(global_clipnorm=1.0)
        for step in range(3):
            optimizer.apply(make_grads(variables, step, scale), variables)
        results.append(numbers_of(optimizer, variables))
        assert np.isfinite(float(optimizer.grad_norm)) and optimizer.skipped_steps == 0
    assert_close(*results)


@pytest.mark.skipif(BACKEND == "jax", reason="its steps can't raise")
def test_raise_names_the_variable_and_changes_nothing():
    variables = make_variables()
    optimizer = fused.FusedAdam(nonfinite="raise")
    before = run(optimizer, variables, 2)
    bad = make_grads(variables, 9, bad=np.inf)
    with pytest.raises(NonFiniteGradientError, match="bias"):
        optimizer.apply(bad, variables)
    assert_same_bits(numbers_of(optimizer, variables), before)


def test_propagate_updates_as_keras_does():
    variables = make_variables()
    optimizer = fused.FusedSGD(nonfinite="propagate", momentum=0.9, nesterov=True, weight_decay=0.1)
    optimizer.apply(make_grads(variables, 9, bad=np.nan), variables)
    assert np.isnan(numbers_of(optimizer, variables)[1]).any() and int(optimizer.iterations) == 1


def test_a_nan_in_an_accumulated_step_drops_that_step():
    variables, others = make_variables(), make_variables()
    options = {"gradient_accumulation_steps": 3, "global_clipnorm": 1.0}
    optimizer, other = (fused.FusedAdamW(**options) for _ in range(2))
    run(other, others, 3)
    run(optimizer, variables, 3)
    for step in (3, 4, 5):
        bad = np.nan if step == 4 else None
        optimizer.apply(make_grads(variables, step, bad=bad), variables)
    assert optimizer.skipped_steps == 1 and int(optimizer.iterations) == 1
    assert_same_bits(numbers_of(optimizer, variables), numbers_of(other, others))


@each_name
def test_a_variable_without_a_gradient_shares_the_counter(name):
    """As Keras's own: one counter for all. The variable itself is left alone."""
    results = []
    for cls in (own_class(name), fused_class(name)):
        variables = make_variables()
        optimizer = cls(0.1)
        optimizer.build(variables)
        for step in range(4):
            grads: list[Any] = make_grads(variables, step)
            if step == 1:
                grads[0] = None
                with pytest.warns(UserWarning, match="Gradients do not exist"):
                    optimizer.apply(grads, variables)
            else:
                optimizer.apply(grads, variables)
        results.append(numbers_of(optimizer, variables))
    assert_close(*results)


@on_torch
def test_gradients_of_a_user_stay_as_they_are():
    import torch

    variables = make_variables()
    grads = make_grads(variables, 0)
    before = [grad.clone() for grad in grads]
    variables[0].value.grad = torch.ones(4, 5)
    fused.FusedAdam(global_clipnorm=1e-3).apply(grads, variables)
    assert all(map(torch.equal, grads, before))
    assert variables[0].value.grad.eq(1).all() and variables[1].value.grad is None


@on_torch
@pytest.mark.parametrize("compiled", [True, False])
def test_a_gradient_is_cast_or_refused_and_given_back(compiled, monkeypatch):
    import torch

    from fusedopt.core import backends

    if not compiled:
        monkeypatch.setattr(backends, "_C", None)
    results = []
    for dtype in (torch.float32, torch.float64):
        variables = make_variables()
        optimizer = fused.FusedAdam(nonfinite="skip")
        optimizer.apply([it.to(dtype) for it in make_grads(variables, 0)], variables)
        results.append(numbers_of(optimizer, variables))
    assert_same_bits(*results)
    grads = make_grads(variables, 1)
    for bad in (grads[:3], [*grads[:3], torch.ones(2)]):
        with pytest.raises((ValueError, RuntimeError), match=r"expected 4|embedding|size"):
            optimizer.apply(bad, variables)
        assert all(it.value.grad is None for it in variables)
    assert_same_bits(numbers_of(optimizer, variables), results[1])


def calls_of_a_step(many: int, scaled: bool) -> list[str]:
    """The calls from Python of a step like the last one."""
    variables = [keras.Variable(np.ones(8, np.float32)) for _ in range(many)]
    grads, calls = [keras.ops.ones(8) for _ in range(many)], []
    optimizer = fused.FusedNadam(global_clipnorm=1.0)
    if scaled:
        optimizer = fused.LossScaleOptimizer(optimizer)
    optimizer.build(variables)

    def note(frame: Any, event: str, argument: Any) -> None:
        if event in ("call", "c_call"):
            calls.append(getattr(argument, "__qualname__", frame.f_code.co_name))

    before = sys.getprofile()
    for profile in (before, before, note):
        sys.setprofile(profile)
        try:
            optimizer.apply(grads, variables)
        finally:
            sys.setprofile(before)
    return calls


@on_torch
@pytest.mark.parametrize("scaled", [False, True])
def test_python_calls_nothing_for_a_variable(scaled):
    few, many = calls_of_a_step(2, scaled), calls_of_a_step(50, scaled)
    assert few == many and "_fused_step" in many


def test_excluded_variables_do_not_decay():
    results = []
    for cls in (keras.optimizers.AdamW, fused.FusedAdamW):
        variables = make_variables()
        optimizer = cls(0.1, weight_decay=0.5)
        optimizer.exclude_from_weight_decay(var_list=[variables[3]], var_names=["bias"])
        results.append(run(optimizer, variables))
    assert_close(*results)


def test_constraints_hold_after_a_step():
    variables = make_variables()
    variables[0].constraint = keras.constraints.NonNeg()
    kernel, _, _, embedding, *_ = run(fused.FusedSGD(0.1), variables, 2)
    assert kernel.min() >= 0 and embedding.min() < 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"global_clipnorm": 0.0}, "Invalid global_clipnorm value: 0.0"),
        ({"nonfinite": "ignore"}, "Invalid nonfinite value: 'ignore'"),
    ],
)
def test_settings_are_refused_by_name(options, words):
    with pytest.raises(ValueError, match=words):
        fused.FusedAdam(**options)


def test_gradients_are_refused_by_name():
    variables = make_variables()
    optimizer = fused.FusedAdam()
    before = run(optimizer, variables, 1)
    grads: list[Any] = make_grads(variables, 1)
    refused: dict[str, Any] = {"embedding is a object": object()}
    if BACKEND == "torch":
        refused["embedding.*sparse"] = grads[3].to_sparse()
    for words, bad in refused.items():
        with pytest.raises((TypeError, RuntimeError), match=words):
            optimizer.apply([*grads[:3], bad], variables)
        assert_same_bits(numbers_of(optimizer, variables), before)


@pytest.mark.parametrize("shape", [(300, 3), (900,), (4, 300), (1, 300)])
def test_a_gradient_of_another_shape_changes_nothing(shape):
    """A step takes the addresses of all arrays, and one size for them."""
    variables = make_variables()
    optimizer = fused.FusedAdam()
    before = run(optimizer, variables, 1)
    grads: list[Any] = [*make_grads(variables, 1)[:3], keras.ops.ones(shape)]
    with pytest.raises((ValueError, RuntimeError), match=r"shape|size"):
        optimizer.apply(grads, variables)
    assert_same_bits(numbers_of(optimizer, variables), before)


def test_a_variable_that_comes_twice_is_refused_by_name():
    variables = make_variables()
    optimizer = fused.FusedAdam()
    before = run(optimizer, variables, 1)
    grads = make_grads(variables, 1)
    with pytest.raises(ValueError, match=r"embedding.* is twice in trainable_variables"):
        optimizer.apply([*grads, grads[3]], [*variables, variables[3]])
    assert_same_bits(numbers_of(optimizer, variables), before)


@pytest.mark.skipif(BACKEND == "jax", reason="JAX has it")
def test_stateless_apply_is_refused_by_name():
    with pytest.raises(NotImplementedError, match=r"stateless_apply\(\) is not supported"):
        fused.FusedAdam().stateless_apply([], [], [])


@each_case
def test_saved_variables_are_keras_own(name, options):
    options = {**options, "use_ema": True, "gradient_accumulation_steps": 2}
    kinds = []
    for cls in (own_class(name), fused_class(name)):
        optimizer = cls(**options)
        optimizer.build(make_variables())
        kinds.append([(it.shape, it.dtype) for it in saved(optimizer)])
    assert kinds[0] == kinds[1]
