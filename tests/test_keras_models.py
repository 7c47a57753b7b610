"""Models with our optimizers: they learn, and are saved and loaded. On any backend of Keras."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from keras_runs import (
    BACKEND,
    NAMES,
    assert_close,
    each_name,
    fused,
    fused_class,
    keras,
    make_grads,
    make_variables,
    numbers_of,
    own_class,
    saved,
    take_step,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy")


def make_model(optimizer: Any, **options: Any) -> Any:
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(16, activation="relu"), keras.layers.Dense(3)]
    model = keras.Sequential([keras.Input((8,)), *layers])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=optimizer, loss=loss, **options)
    return model


def fit(model: Any, epochs: int = 2) -> list[float]:
    x = np.random.default_rng(0).standard_normal((96, 8)).astype("float32")
    y = np.arange(96) % 3
    x[:, 0] += y
    history = model.fit(x, y, epochs=epochs, verbose=0, shuffle=False)
    return history.history["loss"]


@each_name
def test_fit_learns_as_with_keras_own(name):
    options = {"learning_rate": 0.01, "global_clipnorm": 1.0}
    ours = fit(make_model(fused_class(name)(**options)), 4)
    own = fit(make_model(own_class(name)(**options)), 4)
    assert ours == pytest.approx(own, rel=1e-4) and ours[-1] < ours[0]


@pytest.mark.parametrize("name", NAMES if BACKEND == "torch" else ["AdamW", "Nadam"])
def test_saved_models_load_both_ways(tmp_path, name):
    own, ours = own_class(name), fused_class(name)
    path = str(tmp_path / "model.keras")
    model = make_model(ours(0.01, global_clipnorm=1.0))
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
    source = saved(keras.models.load_model(path).optimizer)
    for variable, value in zip(plain.optimizer.variables, source, strict=True):
        variable.assign(value)
    plain.save(path)
    assert fit(plain) == pytest.approx(going_on, rel=1e-4)
    taken = keras.models.load_model(path)
    taken.compile(optimizer=ours.from_keras(taken.optimizer), loss=model.loss)
    assert fit(taken) == going_on


@pytest.mark.skipif(BACKEND != "torch", reason="files are alike on all backends")
def test_keras_alone_loads_a_model_of_ours(tmp_path):
    path = str(tmp_path / "model.keras")
    model = make_model(fused.FusedAdamW(0.01))
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
    expected = float(sum(abs(it).sum() for it in saved(model.optimizer)))
    assert int(printed[0]) == 6 and float(printed[1]) == pytest.approx(expected)


def test_a_loss_scale_costs_no_pass_and_counts_as_keras_own():
    results = []
    for module, inner in ((keras.optimizers, keras.optimizers.AdamW), (fused, fused.FusedAdamW)):
        variables = make_variables()
        optimizer = module.LossScaleOptimizer(
            inner(global_clipnorm=1.0), initial_scale=64.0, dynamic_growth_steps=3
        )
        for step in range(9):
            bad = np.inf if step == 4 else None
            take_step(optimizer, make_grads(variables, step, 100.0, bad), variables)
        assert int(optimizer.iterations) == 8
        results.append(numbers_of(optimizer, variables))
    assert_close(*results)


def test_mixed_precision_trains():
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        scaler = fused.LossScaleOptimizer(fused.FusedAdam(0.01, global_clipnorm=1.0))
        losses = fit(make_model(scaler), 4)
    finally:
        keras.config.set_dtype_policy(policy)
    assert losses[-1] < losses[0] and int(scaler.iterations) == 12


def python(script: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "KERAS_BACKEND": BACKEND}
    command = [sys.executable, "-c", script]
    return subprocess.run(command, capture_output=True, text=True, env=variables, check=True)
