"""Clip coefficients: how they come from a norm, and which one of several counts."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor


class Decision(NamedTuple):
    """The decision of a step."""

    inv_scale: float
    grad_norm: float
    clip_coef: float
    grad_factor: float
    skip: bool


def clip_coefficient(max_norm: float, norm: float) -> float:
    """The factor of `torch.nn.utils.clip_grad_norm_` (Pascanu et al., 2013)."""
    if max_norm == math.inf:
        return 1.0
    coef = max_norm / (norm + 1e-6)
    return 1.0 if coef > 1.0 else coef  # nan stays nan


def smaller(own: float, shared: float) -> float:
    """The smaller of a parameter's own coefficient and the shared one; nan if `shared` is nan."""
    return own if own < shared else shared


def least(coef: float | Tensor) -> float:
    if isinstance(coef, Tensor):
        return coef.min().item() if coef.numel() > 0 else 1.0
    return coef
