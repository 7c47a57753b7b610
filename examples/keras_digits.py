"""Train a small Keras network on scikit-learn's handwritten digits with a fused optimizer.

Usage:
    python examples/keras_digits.py [--epochs 20]

It needs `pip install keras scikit-learn`, and runs on Keras's torch backend, or on another with
KERAS_BACKEND=jax or KERAS_BACKEND=tensorflow. Some batches are spoiled with nan on purpose: the
fused optimizer skips these steps, and the network learns on. With `keras.optimizers.AdamW`, all
weights would be nan.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "torch")

from needs import needs

with needs("keras", "scikit-learn"):
    import keras
    from sklearn.datasets import load_digits

import fusedopt.keras


def main(epochs: int = 20) -> float:
    """Trains the network. Returns its accuracy on images that it has not seen."""
    keras.utils.set_random_seed(0)
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype("float32").reshape(-1, 8, 8, 1)
    unseen = slice(1500, None)
    test = images[unseen], labels[unseen]
    train, targets = images[:1500], labels[:1500]

    model: Any = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(16, 3, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(10),
        ]
    )
    optimizer = fusedopt.keras.FusedAdamW(3e-3, global_clipnorm=1.0)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=optimizer, loss=loss, metrics=["accuracy"])
    for _ in range(3):
        model.train_on_batch(train[:32] * float("nan"), targets[:32])
    model.fit(train, targets, batch_size=64, epochs=epochs, verbose=int(sys.stdout.isatty()))
    accuracy = model.evaluate(*test, verbose=0, return_dict=True)["accuracy"]
    print(f"{int(optimizer.iterations)} steps, {int(optimizer.skipped_steps)} bad batches skipped")
    print(f"last gradient norm: {float(optimizer.grad_norm):.4f}")
    print(f"accuracy on images not seen before: {accuracy:.2%}")
    return accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=20, help="default: 20")
    main(parser.parse_args().epochs)
