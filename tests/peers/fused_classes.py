"""A pytest plugin: torch.optim's classes become fusedopt's, before any other library sees them."""

from __future__ import annotations

import sys

import torch

from fusedopt.self_check import CLASSES

NAMED = {cls.__name__.removeprefix("Fused"): cls for cls in CLASSES}
SUBSTITUTES = {name: cls for name, cls in NAMED.items() if hasattr(torch.optim, name)}

for name, cls in SUBSTITUTES.items():
    module = sys.modules[getattr(torch.optim, name).__module__]
    # Libraries look up classes by their names, and pickle by their modules.
    substitute = type(name, (cls,), {"__module__": module.__name__, "__qualname__": name})
    setattr(module, name, substitute)
    setattr(torch.optim, name, substitute)
