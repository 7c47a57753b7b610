"""`fusedopt.keras` on TensorFlow: the bits of `fusedopt.arrays`, graphs, sparse gradients.

`make test-tensorflow` runs it where there is no torch, and test_keras.py with this backend.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

tf: Any = pytest.importorskip("tensorflow", reason="TensorFlow isn't installed")
if os.environ.get("KERAS_BACKEND") != "tensorflow":
    pytest.skip("KERAS_BACKEND is another", allow_module_level=True)

from keras_runs import (  # noqa: E402
    CASES,
    assert_same_bits,
    each_case,
    fused,
    fused_class,
    keras,
    make_arrays,
    make_grads,
    make_variables,
    numbers_of,
    run,
)

from fusedopt import arrays  # noqa: E402
from fusedopt.core.nonfinite import NonFiniteGradientError  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy")
ROOT = Path(__file__).resolve().parent.parent
ARRAYS = {"adam": arrays.Adam, "nadam": arrays.NAdam, "rmsprop": arrays.RMSprop, "sgd": arrays.SGD}
COMMON: list[dict[str, Any]] = [
    {"global_clipnorm": 1.0},
    {"gradient_accumulation_steps": 2, "loss_scale_factor": 8.0},
    {"use_ema": True, "ema_overwrite_frequency": 2, "gradient_accumulation_steps": 3},
    {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 3},
]
IN_GRAPHS = [(*it, {}) for it in CASES]
IN_GRAPHS += [(name, {}, common) for name in ("AdamW", "Nadam") for common in COMMON]


@pytest.fixture(autouse=True)
def no_warnings_of_autograph(caplog):
    """AutoGraph would rewrite our code in a user's tf.function, and warn where it can't."""
    tf.get_logger().addHandler(caplog.handler)
    yield
    tf.get_logger().removeHandler(caplog.handler)
    assert not [it for it in caplog.get_records("call") if "AutoGraph" in it.getMessage()]


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@each_case
def test_a_step_has_the_bits_of_arrays(name, options, dtype):
    """`fusedopt.arrays` has the bits of the reference: tests/test_arrays.py."""
    optimizer = fused_class(name)(**{"global_clipnorm": 1.0, **options})
    variables = make_variables(dtype)
    params = [np.array(it.value) for it in variables]
    reference = ARRAYS[optimizer.rule](params, max_grad_norm=optimizer.global_clipnorm)
    for key, value in optimizer._options().items():
        setattr(reference, key, value)
    reference.weight_decay = optimizer.weight_decay or 0.0
    for step in range(4):
        grads = make_arrays(variables, step)
        optimizer.apply(make_grads(variables, step), variables)
        reference.lr = float(optimizer.learning_rate)
        reference.step([np.asarray(grad, it.dtype) for grad, it in zip(grads, params)])
        for state in reference.state:  # Keras's one product has the first variable's dtype
            if "mu_product" in state:
                state["mu_product"][...] = state["mu_product"].astype(params[0].dtype)
    states = [[it[key] for it in reference.state] for key in optimizer._states()]
    columns = (variables, *optimizer._states().values())
    assert_same_bits([it.numpy() for its in columns for it in its], sum(states, params))


@pytest.mark.parametrize(("name", "options", "common"), IN_GRAPHS, ids=str)
def test_a_graph_gives_the_bits_of_eager_steps(name, options, common):
    results = []
    for in_graph in (False, True):
        optimizer, variables = fused_class(name)(**options, **common), make_variables()
        optimizer.build(variables)

        call = optimizer.apply  # of all variables
        if in_graph:
            call = tf.function(call)
        for step in range(7):
            call(make_grads(variables, step, bad=np.nan if step == 3 and common else None))
        results.append([*numbers_of(optimizer, variables), optimizer.skipped_steps.numpy()])
        results[-1].append(optimizer.grad_norm.numpy())
    assert_same_bits(*results)


def test_a_graph_notices_another_learning_rate():
    results = []
    for rates in ([0.1, 0.2], [0.1, 0.1]):
        optimizer, variables = fused.FusedSGD(0.1), make_variables()
        optimizer.build(variables)
        call = tf.function(optimizer.apply)  # of all variables
        for step, rate in enumerate(rates):
            optimizer.learning_rate = rate
            call(make_grads(variables, step))
        assert call.experimental_get_tracing_count() == 1
        results.append(variables[0].numpy())
    assert (results[0] != results[1]).any()


def test_sparse_gradients_are_made_dense():
    results = []
    for dense in (False, True):
        optimizer, variables = fused.FusedAdam(global_clipnorm=1.0), make_variables()
        grads = make_grads(variables, 0)
        grads[3] = tf.IndexedSlices(
            tf.ones((3, 300)), tf.constant([2, 0, 2]), tf.constant([3, 300])
        )
        if dense:
            grads[3] = tf.convert_to_tensor(grads[3])
        optimizer.apply(grads, variables)
        results.append(numbers_of(optimizer, variables))
    assert_same_bits(*results)


def make_model(optimizer: Any, **options: Any) -> Any:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(3, name="dense")])
    model.compile(optimizer=optimizer, loss="mse", **options)
    return model


def fit(model: Any, *bad: int) -> None:
    """An epoch of 6 steps; these are bad."""
    x = np.random.default_rng(0).standard_normal((48, 8)).astype("float32")
    for step in bad:
        x[step * 8] = np.nan
    model.fit(x, x[:, :3] * 0 + 1, batch_size=8, verbose=0, shuffle=False)


@pytest.mark.parametrize(
    "options", [{}, {"run_eagerly": True}, {"steps_per_execution": 3}], ids=str
)
def test_fit_skips_bad_batches(options):
    optimizer = fused.FusedAdamW(0.01, global_clipnorm=1.0)
    model = make_model(optimizer, **options)
    fit(model, 1, 4)
    assert int(optimizer.iterations) == 4 and int(optimizer.skipped_steps) == 2
    assert not optimizer.step_skipped and float(optimizer.grad_norm) > 0
    assert all(np.isfinite(it.numpy()).all() for it in (*model.weights, *optimizer.variables))


def test_a_model_with_an_embedding_learns_as_with_keras_own():
    losses = []
    for cls in (keras.optimizers.Adam, fused.FusedAdam):
        keras.utils.set_random_seed(0)
        layers = [keras.layers.Embedding(50, 4), keras.layers.Flatten(), keras.layers.Dense(1)]
        model = keras.Sequential([keras.Input((3,), dtype="int32"), *layers])
        model.compile(optimizer=cls(0.01, global_clipnorm=1.0), loss="mse")
        x = np.random.default_rng(0).integers(0, 50, (48, 3), "int32")
        history = model.fit(x, x.sum(1) / 50, epochs=3, verbose=0, shuffle=False)
        losses.append(history.history["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0][-1] < losses[0][0]


def test_fit_raises_with_the_names_of_the_variables():
    optimizer = fused.FusedAdamW(0.01, nonfinite="raise")
    model = make_model(optimizer)
    words = "NonFiniteGradientError: inf or nan in the gradients: .*dense/kernel has 0 inf"
    with pytest.raises(tf.errors.UnknownError, match=words):
        fit(model, 1)
    assert int(optimizer.iterations) == 1 and int(optimizer.skipped_steps) == 1
    with pytest.raises(NonFiniteGradientError, match="dense/kernel"):
        fit(make_model(fused.FusedAdamW(nonfinite="raise"), run_eagerly=True), 1)


def test_xla_is_refused_by_name():
    model = make_model(fused.FusedAdam(), jit_compile=True)
    with pytest.raises(
        NotImplementedError, match=r"FusedAdam .* jit_compile=True.*jit_compile=False"
    ):
        fit(model)


def test_strategies_are_refused_by_name():
    with tf.distribute.OneDeviceStrategy("/cpu:0").scope():
        model = make_model(fused.FusedAdam())
    with pytest.raises(NotImplementedError, match="FusedAdam does not work with OneDeviceStrategy"):
        fit(model)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (tf.zeros((3, 3)), r"embedding has the shape \(3, 3\); expected \(3, 300\)"),
        (np.zeros((3, 300)), "embedding is a ndarray; expected a tf.Tensor"),
        (tf.sparse.from_dense(tf.zeros((3, 300))), "embedding is a SparseTensor; expected"),
    ],
    ids=["shape", "array", "sparse"],
)
def test_gradients_are_refused_by_name_and_nothing_changes(bad, words):
    optimizer, variables = fused.FusedAdam(), make_variables()
    before = run(optimizer, variables, 1)
    with pytest.raises((TypeError, ValueError), match=words):
        optimizer.apply([*make_grads(variables, 1)[:3], bad], variables)
    assert_same_bits(numbers_of(optimizer, variables), before)


@pytest.mark.skipif(find_spec("torch") is None, reason="no torch here: every test shows it")
def test_it_does_not_import_torch():
    script = "import sys, fusedopt.keras as it; it.FusedSGD(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)
