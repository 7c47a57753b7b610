"""A model for tests of files that move between Keras's backends.

    KERAS_BACKEND=jax python tests/keras_moves.py

writes tests/models/jax.keras: the model after some steps on this backend.
"""

from __future__ import annotations

import json
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from keras_runs import BACKEND, fused, keras  # skips where there is no Keras

import h5py  # isort: skip

FOLDER = Path(__file__).with_name("models")


def make_model() -> Any:
    """A compiled model whose first weights are the same on all backends."""
    layers = [
        keras.layers.Dense(3, activation="tanh", name="first"),
        keras.layers.Dense(2, name="last"),
    ]
    model = keras.Sequential([keras.Input((4,)), *layers], name="moved")
    rng = np.random.default_rng(0)
    model.set_weights([np.float32(rng.standard_normal(it.shape)) for it in model.weights])
    optimizer = fused.FusedNadam(0.01, global_clipnorm=1.0, weight_decay=0.1)
    model.compile(optimizer=optimizer, loss="mse")
    return model


def fit(model: Any) -> list[float]:
    """The losses of 3 epochs of 3 steps."""
    x = np.float32(np.random.default_rng(1).standard_normal((48, 4)))
    done = model.fit(x, x[:, :2] * x[:, 2:], batch_size=16, epochs=3, verbose=0, shuffle=False)
    return done.history["loss"]


def contents(path: Path) -> tuple[Any, dict[str, Any]]:
    """The config in a saved file, and its arrays by name."""
    arrays: dict[str, Any] = {}

    def comparable(found: dict[str, Any]) -> dict[str, Any]:
        # Without addresses, and without names: Keras numbers them in a process.
        return {key: it for key, it in found.items() if key not in ("shared_object_id", "name")}

    def keep(name: str, found: Any) -> None:
        if isinstance(found, h5py.Dataset):
            arrays[name] = found[()]

    with zipfile.ZipFile(path) as archive:
        config = json.loads(archive.read("config.json"), object_hook=comparable)
        with h5py.File(BytesIO(archive.read("model.weights.h5"))) as file:
            file.visititems(keep)
    return config, arrays


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    model = make_model()
    fit(model)
    model.save(FOLDER / f"{BACKEND}.keras")
