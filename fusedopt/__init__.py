"""The optimizer step of PyTorch training as one fast, safe operation."""

from fusedopt import reference
from fusedopt.adam import FusedAdam, FusedAdamW
from fusedopt.checks import NonFiniteGradientError
from fusedopt.clip_grad import clip_grad_norm_, clip_grads_with_norm_, get_total_norm
from fusedopt.optimizer import FusedOptimizer
from fusedopt.rmsprop import FusedRMSprop

__version__ = "0.1.0"

__all__ = [
    "FusedAdam",
    "FusedAdamW",
    "FusedOptimizer",
    "FusedRMSprop",
    "NonFiniteGradientError",
    "clip_grad_norm_",
    "clip_grads_with_norm_",
    "get_total_norm",
    "reference",
]
