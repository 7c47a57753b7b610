"""A plugin of pytest: Keras's own tests of its optimizers get fusedopt's classes.

    python -m pytest -p peers.keras_classes --pyargs keras.src.optimizers.adam_test

It takes their place where the tests import them from.
"""

from __future__ import annotations

import importlib

import fusedopt.keras

for _name in ("Adam", "AdamW", "Nadam", "RMSprop", "SGD"):
    _module = importlib.import_module(f"keras.src.optimizers.{_name.lower()}")
    setattr(_module, _name, getattr(fusedopt.keras, f"Fused{_name}"))
