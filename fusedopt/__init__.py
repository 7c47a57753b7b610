"""The optimizer step of PyTorch training as one fast, safe operation."""

from fusedopt import reference
from fusedopt.adam import FusedAdam, FusedAdamW
from fusedopt.checks import NonFiniteGradientError
from fusedopt.optimizer import FusedOptimizer
from fusedopt.rmsprop import FusedRMSprop

__version__ = "0.1.0"

__all__ = [
    "FusedAdam",
    "FusedAdamW",
    "FusedOptimizer",
    "FusedRMSprop",
    "NonFiniteGradientError",
    "reference",
]
