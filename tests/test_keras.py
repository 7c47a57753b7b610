"""`fusedopt.keras`: Keras's own steps; the reference's bits; bad batches; saved models."""

from __future__ import annotations

import inspect
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy")

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["Adam", "AdamW", "Nadam", "SGD"]
SHAPES = [(4, 5), (7,), (), (3, 300)]
CASES = [
    ("Adam", {}),
    ("Adam", {"weight_decay": 0.1, "learning_rate": 0.1}),
    ("Adam", {"amsgrad": True, "epsilon": 1e-2, "beta_1": 0.5}),
    ("AdamW", {}),
    ("AdamW", {"amsgrad": True, "beta_2": 0.9, "epsilon": 0.1}),
    ("Nadam", {}),
    ("Nadam", {"weight_decay": 0.1, "epsilon": 0.1}),
    ("SGD", {}),
    ("SGD", {"momentum": 0.9}),
    ("SGD", {"momentum": 0.9, "nesterov": True}),
    ("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "global_clipnorm": 2.0}),
    ("SGD", {"weight_decay": 0.1, "momentum": 0.5}),
]
COMMON = [
    {},
    {"global_clipnorm": 1.0},
    {"gradient_accumulation_steps": 2, "global_clipnorm": 1.0},
    {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 3},
    {"use_ema": True, "gradient_accumulation_steps": 3, "ema_overwrite_frequency": 2},
    {"loss_scale_factor": 8.0},
    {"loss_scale_factor": 8.0, "gradient_accumulation_steps": 2},
    {"learning_rate": "schedule"},
]


@pytest.fixture(scope="module")
def keras() -> Any:
    os.environ.setdefault("KERAS_BACKEND", "torch")
    found = pytest.importorskip("keras", reason="keras isn't installed")
    if found.config.backend() != "torch":
        pytest.skip(f"KERAS_BACKEND is {found.config.backend()}; fusedopt.keras works on torch")
    return found


@pytest.fixture(scope="module")
def fused(keras: Any) -> Any:
    import fusedopt.keras

    return fusedopt.keras


def make_variables(keras: Any, dtype: str = "float32") -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    names = ["kernel", "bias", "scalar", "embedding"]
    return [
        keras.Variable(torch.randn(shape, generator=generator), dtype=dtype, name=name)
        for shape, name in zip(SHAPES, names)
    ]


def make_grads(variables: list[Any], seed: int, scale: float = 3.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(it.value.shape, generator=generator) * scale).to(it.value.dtype)
        for it in variables
    ]


def options_of(keras: Any, options: dict[str, Any]) -> dict[str, Any]:
    if options.get("learning_rate") != "schedule":
        return options
    return {**options, "learning_rate": keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5)}


def numbers_of(optimizer: Any, variables: list[Any]) -> list[torch.Tensor]:
    return [it.value.detach().clone() for it in (*variables, *optimizer.variables)]


def run(optimizer: Any, variables: list[Any], steps: int = 7) -> list[torch.Tensor]:
    for step in range(steps):
        optimizer.apply(make_grads(variables, step), variables)
    return numbers_of(optimizer, variables)


def assert_same_bits(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(actual) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected))


def assert_close(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """Within some roundings; clipping differs by torch's 1e-6 beside the norm."""
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("common", COMMON, ids=str)
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_a_class_steps_as_keras_own(keras, fused, name, options, common):
    options = options_of(keras, {**options, **common})
    own = getattr(keras.optimizers, name)(**options)
    ours = getattr(fused, f"Fused{name}")(**options)
    expected = run(own, make_variables(keras))
    assert_close(run(ours, make_variables(keras)), expected)
    kinds = [[(it.shape, it.dtype) for it in opt.variables] for opt in (ours, own)]
    assert kinds[0] == kinds[1]


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_a_step_has_the_bits_of_the_reference(keras, fused, monkeypatch, name, options, dtype):
    cls = getattr(fused, f"Fused{name}")
    results = []
    for backend in ("cpu", "reference"):
        monkeypatch.setattr(cls, "torch_options", {**cls.torch_options, "backend": backend})
        variables = make_variables(keras, dtype)
        results.append(run(cls(**{"global_clipnorm": 1.0, **options}), variables))
    assert_same_bits(*results)


@pytest.mark.parametrize("name", NAMES)
def test_signature_and_config_are_keras_own(keras, fused, name):
    cls, own = getattr(fused, f"Fused{name}"), getattr(keras.optimizers, name)
    arguments = list(inspect.signature(cls).parameters)
    assert [it for it in arguments if it != "nonfinite"] == list(inspect.signature(own).parameters)
    assert isinstance(cls(), keras.optimizers.Optimizer)
    config = cls(0.5).get_config()
    assert {**config, "name": None} == {**own(0.5).get_config(), "name": None}
    assert cls.from_config(cls(nonfinite="raise").get_config()).nonfinite == "raise"


@pytest.mark.parametrize("common", [{}, {"use_ema": True}, {"loss_scale_factor": 4.0}], ids=str)
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_a_nan_batch_changes_nothing(keras, fused, name, options, common):
    options = {"global_clipnorm": 1.0, **options, **common}
    variables, others = make_variables(keras), make_variables(keras)
    optimizer, other = (getattr(fused, f"Fused{name}")(**options) for _ in range(2))
    for step in range(4):
        optimizer.apply(make_grads(variables, step), variables)
        other.apply(make_grads(variables, step), others)
        bad = make_grads(variables, 9)
        bad[1][3] = torch.nan
        optimizer.apply(bad, variables)
        assert optimizer.step_skipped and int(optimizer.iterations) == step + 1
        assert_same_bits(numbers_of(optimizer, variables), numbers_of(other, others))
    assert optimizer.skipped_steps == 4 and other.skipped_steps == 0


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_1e30_are_clipped(keras, fused, name):
    results = []
    for scale in (1e30, 1e3):
        variables = make_variables(keras)
        optimizer = getattr(fused, f"Fused{name}")(global_clipnorm=1.0)
        for step in range(3):
            optimizer.apply(make_grads(variables, step, scale), variables)
        results.append(numbers_of(optimizer, variables))
        assert optimizer.grad_norm.isfinite() and optimizer.skipped_steps == 0
    assert_close(*results)


def test_raise_names_the_variable_and_changes_nothing(keras, fused):
    from fusedopt import NonFiniteGradientError

    variables = make_variables(keras)
    optimizer = fused.FusedAdam(nonfinite="raise")
    before = run(optimizer, variables, 2)
    bad = make_grads(variables, 9)
    bad[1][3] = torch.inf
    with pytest.raises(NonFiniteGradientError, match="bias"):
        optimizer.apply(bad, variables)
    assert_same_bits(numbers_of(optimizer, variables), before)


def test_propagate_updates_as_keras_does(keras, fused):
    variables = make_variables(keras)
    bad = make_grads(variables, 9)
    bad[1][3] = torch.nan
    optimizer = fused.FusedSGD(nonfinite="propagate", momentum=0.9, nesterov=True, weight_decay=0.1)
    optimizer.apply(bad, variables)
    assert variables[1].value.isnan().any() and int(optimizer.iterations) == 1


def test_a_nan_in_an_accumulated_step_drops_that_step(keras, fused):
    variables, others = make_variables(keras), make_variables(keras)
    options = {"gradient_accumulation_steps": 3, "global_clipnorm": 1.0}
    optimizer, other = (fused.FusedAdamW(**options) for _ in range(2))
    run(other, others, 3)
    run(optimizer, variables, 3)
    for step in (3, 4, 5):
        grads = make_grads(variables, step)
        grads[0][0, 0] = torch.nan if step == 4 else 0.0
        optimizer.apply(grads, variables)
    assert optimizer.skipped_steps == 1 and int(optimizer.iterations) == 1
    assert_same_bits(numbers_of(optimizer, variables), numbers_of(other, others))


@pytest.mark.parametrize("name", NAMES)
def test_a_variable_without_a_gradient_shares_the_counter(keras, fused, name):
    """As Keras's own: one counter for all. The variable itself is left alone."""
    results = []
    for cls in (getattr(keras.optimizers, name), getattr(fused, f"Fused{name}")):
        variables = make_variables(keras)
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


def test_gradients_of_a_user_stay_as_they_are(keras, fused):
    variables = make_variables(keras)
    grads = make_grads(variables, 0)
    before = [grad.clone() for grad in grads]
    variables[0].value.grad = torch.ones(SHAPES[0])
    fused.FusedAdam(global_clipnorm=1e-3).apply(grads, variables)
    assert_same_bits(grads, before)
    assert variables[0].value.grad.eq(1).all() and variables[1].value.grad is None


def test_excluded_variables_do_not_decay(keras, fused):
    results = []
    for cls in (keras.optimizers.AdamW, fused.FusedAdamW):
        variables = make_variables(keras)
        optimizer = cls(0.1, weight_decay=0.5)
        optimizer.exclude_from_weight_decay(var_list=[variables[3]], var_names=["bias"])
        results.append(run(optimizer, variables))
    assert_close(*results)


def test_constraints_hold_after_a_step(keras, fused):
    variables = make_variables(keras)
    variables[0].constraint = keras.constraints.NonNeg()
    run(fused.FusedSGD(0.1), variables, 2)
    assert variables[0].value.min() >= 0 and variables[3].value.min() < 0


def make_model(keras: Any, optimizer: Any, **options: Any) -> Any:
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(16, activation="relu"), keras.layers.Dense(3)]
    model = keras.Sequential([keras.Input((8,)), *layers])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=optimizer, loss=loss, **options)
    return model


def fit(model: Any, epochs: int = 2) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(96, 8, generator=generator), torch.arange(96) % 3
    x[:, 0] += y
    history = model.fit(x.numpy(), y.numpy(), epochs=epochs, verbose=0, shuffle=False)
    return history.history["loss"]


@pytest.mark.parametrize("name", NAMES)
def test_fit_learns_as_with_keras_own(keras, fused, name):
    options = {"learning_rate": 0.01, "global_clipnorm": 1.0}
    ours = fit(make_model(keras, getattr(fused, f"Fused{name}")(**options)), 4)
    own = fit(make_model(keras, getattr(keras.optimizers, name)(**options)), 4)
    assert ours == pytest.approx(own, rel=1e-4) and ours[-1] < ours[0]


@pytest.mark.parametrize("name", NAMES)
def test_saved_models_load_both_ways(keras, fused, tmp_path, name):
    own, ours = getattr(keras.optimizers, name), getattr(fused, f"Fused{name}")
    path = str(tmp_path / "model.keras")
    model = make_model(keras, ours(0.01, global_clipnorm=1.0))
    fit(model)
    model.save(path)
    again = keras.models.load_model(path)
    assert type(again.optimizer) is ours and int(again.optimizer.iterations) == 6
    going_on = fit(model)
    assert fit(again) == going_on  # to the bit

    config = keras.models.load_model(path).optimizer.get_config()
    plain = keras.models.load_model(path, compile=False)
    plain.compile(optimizer=own.from_config(config), loss=model.loss)
    plain.optimizer.build(plain.trainable_variables)
    source = keras.models.load_model(path).optimizer.variables
    for variable, saved in zip(plain.optimizer.variables, source, strict=True):
        variable.assign(saved)
    plain.save(path)
    assert fit(plain) == pytest.approx(going_on, rel=1e-4)
    taken = keras.models.load_model(path, custom_objects={name: ours})
    assert type(taken.optimizer) is ours
    assert fit(taken) == going_on


def test_keras_alone_loads_a_model_of_ours(keras, fused, tmp_path):
    path = str(tmp_path / "model.keras")
    model = make_model(keras, fused.FusedAdamW(0.01))
    fit(model)
    model.save(path)
    script = f"""
import sys
sys.modules["fusedopt"] = None
import keras
names = {{"fusedopt>FusedAdamW": keras.optimizers.AdamW}}
optimizer = keras.models.load_model({path!r}, custom_objects=names).optimizer
assert isinstance(optimizer, keras.optimizers.AdamW)
print(int(optimizer.iterations), float(sum(abs(it.numpy()).sum() for it in optimizer.variables)))
"""
    printed = python(script).stdout.split()
    expected = float(sum(abs(it.numpy()).sum() for it in model.optimizer.variables))
    assert int(printed[0]) == 6 and float(printed[1]) == pytest.approx(expected)


def test_a_loss_scale_costs_no_pass_and_counts_as_keras_own(keras, fused):
    results = []
    for module, inner in ((keras.optimizers, keras.optimizers.AdamW), (fused, fused.FusedAdamW)):
        variables = make_variables(keras)
        optimizer = module.LossScaleOptimizer(
            inner(global_clipnorm=1.0), initial_scale=64.0, dynamic_growth_steps=3
        )
        for step in range(9):
            grads = make_grads(variables, step, 100.0)
            grads[1][0] = torch.inf if step == 4 else 1.0
            optimizer.apply(grads, variables)
        assert int(optimizer.iterations) == 8
        results.append(numbers_of(optimizer, variables))
    assert_close(*results)


def test_mixed_precision_trains(keras, fused):
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        scaler = fused.LossScaleOptimizer(fused.FusedAdam(0.01, global_clipnorm=1.0))
        losses = fit(make_model(keras, scaler), 4)
    finally:
        keras.config.set_dtype_policy(policy)
    assert losses[-1] < losses[0] and int(scaler.iterations) == 12


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"clipnorm": 1.0}, "clipnorm=1.0 is not supported by FusedAdam"),
        ({"clipvalue": 1.0}, "clipvalue=1.0 is not supported by FusedAdam"),
        ({"global_clipnorm": 0.0}, "Invalid global_clipnorm value: 0.0"),
        ({"nonfinite": "ignore"}, "Invalid nonfinite value: 'ignore'"),
    ],
)
def test_settings_are_refused_by_name(keras, fused, options, words):
    with pytest.raises(ValueError, match=words):
        fused.FusedAdam(**options)


def test_gradients_are_refused_by_name(keras, fused):
    variables = make_variables(keras)
    optimizer = fused.FusedAdam()
    before = run(optimizer, variables, 1)
    grads: list[Any] = make_grads(variables, 1)
    refused = {"embedding is a object": object(), "embedding.*sparse": grads[3].to_sparse()}
    for words, bad in refused.items():
        with pytest.raises((TypeError, RuntimeError), match=words):
            optimizer.apply([*grads[:3], bad], variables)
        assert_same_bits(numbers_of(optimizer, variables), before)
    with pytest.raises(NotImplementedError, match=r"stateless_apply\(\) is not supported"):
        optimizer.stateless_apply([], [], [])


def python(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "KERAS_BACKEND": "torch", **environment}
    command = [sys.executable, "-c", script]
    return subprocess.run(command, capture_output=True, text=True, env=variables, check=True)


def test_another_backend_is_refused_by_name(keras):
    script = "try: import fusedopt.keras\nexcept ImportError as error: print(error)"
    printed = python(script, KERAS_BACKEND="jax").stdout
    assert printed.startswith("KERAS_BACKEND is jax; fusedopt.keras works on torch so far")


def test_fusedopt_alone_does_not_import_keras():
    python("import sys, fusedopt; assert 'keras' not in sys.modules")


def test_the_example_learns(keras, fused, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    example = runpy.run_path(str(ROOT / "examples" / "keras_digits.py"))
    assert example["main"]() > 0.9
    assert "3 bad batches skipped" in capsys.readouterr().out
