"""Models move between Keras's backends. tests/models has a file that each of them has written."""

from __future__ import annotations

import numpy as np
import pytest
from keras_moves import FOLDER, contents, fit, make_model
from keras_runs import BACKEND, fused, keras

from fusedopt.keras.backend import BACKENDS

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy")
each_writer = pytest.mark.parametrize("writer", BACKENDS)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The file that this backend writes, and the losses with which the model goes on."""
    path = tmp_path_factory.mktemp("models") / "model.keras"
    model = make_model()
    fit(model)
    model.save(path)
    return path, fit(model)


@each_writer
def test_a_model_goes_on_where_another_backend_left_it(written, writer):
    model = keras.models.load_model(FOLDER / f"{writer}.keras")
    assert type(model.optimizer) is fused.FusedNadam and int(model.optimizer.iterations) == 9
    model.jit_compile = BACKEND == "jax"  # it is saved as it was there
    assert fit(model) == pytest.approx(written[1], rel=1e-4)


@each_writer
def test_this_backend_writes_what_another_one_writes(written, writer):
    config, arrays = contents(written[0])
    other_config, other_arrays = contents(FOLDER / f"{writer}.keras")
    for it in (config, other_config):
        del it["compile_config"]["jit_compile"]
    assert config == other_config
    assert arrays.keys() == other_arrays.keys()
    for name, array in arrays.items():
        other = other_arrays[name]  # Keras's counter is int32, and int64 on TensorFlow
        assert array.shape == other.shape and array.dtype.kind == other.dtype.kind, name
        np.testing.assert_allclose(array, other, 1e-4, 1e-6, err_msg=name)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="KERAS_BACKEND is another")
def test_a_model_of_jaxs_that_asks_for_xla_is_refused_by_name():
    model = keras.models.load_model(FOLDER / "jax.keras")
    with pytest.raises(NotImplementedError, match=r"jit_compile=True.*model.jit_compile = False"):
        fit(model)
