"""Train a small network in JAX on scikit-learn's handwritten digits with a fused optimizer.

Usage:
    python examples/jax_digits.py [--epochs 20]

It needs `pip install jax scikit-learn tqdm`. Some batches are spoiled with nan on purpose: the
fused optimizer skips these steps, and the network learns on.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import argparse
import functools

from needs import needs

with needs("jax", "scikit-learn", "tqdm"):
    import jax
    import jax.numpy as jnp
    import numpy as np
    from sklearn.datasets import load_digits
    from tqdm import tqdm

import fusedopt.jax

OPTIMIZER = fusedopt.jax.adamw(3e-3, weight_decay=1e-2, max_grad_norm=1.0)


def logits(params, images):
    hidden = jax.nn.relu(images @ params["hidden"]["w"] + params["hidden"]["b"])
    return hidden @ params["output"]["w"] + params["output"]["b"]


def loss(params, images, labels):
    return -(jax.nn.log_softmax(logits(params, images)) * jax.nn.one_hot(labels, 10)).sum(1).mean()


@functools.partial(jax.jit, donate_argnums=(0, 1))
def train(params, state, images, labels):
    return OPTIMIZER.step(params, jax.grad(loss)(params, images, labels), state)


def main(epochs: int = 20) -> float:
    """Trains the network. Returns its accuracy on images that it has not seen."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    draw = np.random.default_rng(0).normal
    params = {
        name: {"w": jnp.asarray(draw(0, 0.1, size), jnp.float32), "b": jnp.zeros(size[1])}
        for name, size in (("hidden", (64, 128)), ("output", (128, 10)))
    }
    state = OPTIMIZER.init(params)
    for step in tqdm(range(epochs * 23), disable=None, leave=False, desc="training", unit="step"):
        rows = slice(step % 23 * 64, step % 23 * 64 + 64)
        spoiled = images[rows] * np.float32("nan" if step % 100 == 50 else 1)
        params, state = train(params, state, spoiled, labels[rows])
    accuracy = float((logits(params, images[1500:]).argmax(1) == labels[1500:]).mean())
    print(f"{state.count} steps, {state.skips} bad batches skipped")
    print(f"accuracy on images not seen before: {accuracy:.2%}")
    return accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=20, help="default: 20")
    main(parser.parse_args().epochs)
