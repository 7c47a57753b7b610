"""Limits that adapt themselves, and steps to adapt to."""

from __future__ import annotations

import math

from cases import set_grads

from fusedopt.clip import Percentile, PerTensor, Unit, ZScore

GLOBAL = [Percentile(80, window=5, warmup=3), Percentile(100, window=4, warmup=1), ZScore(warmup=4)]
OWN = [PerTensor(warmup=3), Unit(0.5), PerTensor(warmup=2, max_norm=50.0), Unit(0.1, max_norm=50.0)]
LIMITS = [*GLOBAL, *OWN]
LEARNING = [limit for limit in LIMITS if not isinstance(limit, Unit)]
# Units that fit a chunk, that two share, that are longer than one, and those of a single element.
UNITS = [(4, 5), (1,), (0, 3), (3, 0), (700, 33), (3, 20000), (40000,), (6, 2, 3, 3), (50, 1), ()]
# Of the gradients, by step: two spikes, and a step without a finite gradient.
SCALES = [1.0, 1.2, 0.8, 1.1, 30.0, 0.9, math.nan, 1.0, 50.0, 1.1, 1.0]


def run(optimizer, params, scales=SCALES, first=0):
    """The limits' effect on each step, and the norms."""
    norms, coefs = [], []
    for step, scale in enumerate(scales, first):
        set_grads(params, step, scale)
        optimizer.step()
        norms.append(optimizer.grad_norm.item())
        coefs.append(optimizer._readings()[2].item())
    return norms, coefs
