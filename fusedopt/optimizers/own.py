"""The base of the classes that torch doesn't have."""

from __future__ import annotations

from typing import Any

from torch.optim.optimizer import ParamsT

from fusedopt.core.checks import checked_defaults
from fusedopt.core.optimizer import FusedOptimizer

# Options that torch's classes have, too. Checkpoints of other packages lack them.
FLAGS = {"maximize": False, "foreach": None, "capturable": False, "differentiable": False}


class OwnOptimizer(FusedOptimizer):
    """What torch's classes do for the others: check the options, and fill in missing ones."""

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        super().__init__(params, checked_defaults(self.rule, defaults))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for key, value in FLAGS.items():
                group.setdefault(key, value)
