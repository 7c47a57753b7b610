"""What a step does with its gradients: unscaling and clipping, or a skip."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor

from fusedopt.reference.coefficients import Decision, clip_coefficient
from fusedopt.reference.limits import AdaptiveClip


class StepOptions(NamedTuple):
    """What one call of `step()` asks for, beside the hyperparameters in the groups."""

    max_grad_norm: float  # infinity: never clip
    measure: bool  # the norm is known before the update
    skip_nonfinite: bool  # leave everything as it was when a gradient holds inf or nan
    grad_scale: Tensor | None  # one float32: the gradients are to be divided by it
    found_inf: Tensor | None  # one float32: anything but zero asks for a skip
    clip: tuple[AdaptiveClip, Tensor] | None = None  # below `max_grad_norm`, and its state

    def for_kernels(self) -> tuple[Any, ...]:
        """The same for a compiled backend."""
        if self.clip is None:
            return self
        limit, state = self.clip
        return (*self[:-1], (limit.kind, limit.arguments(), state))

    def asks_for_skip(self) -> bool:
        return self.found_inf is not None and self.found_inf.float().item() != 0


class Control:
    """Indices into the float64 tensor that a step leaves its readings in."""

    FIELDS = (
        "sum_of_squares",
        "grad_norm",
        "clip_coef",
        "step_skipped",
        "skipped_steps",
        "consecutive_skips",
        "steps",
    )
    SUM_OF_SQUARES, GRAD_NORM, CLIP_COEF, STEP_SKIPPED, SKIPPED_STEPS = range(5)
    CONSECUTIVE_SKIPS, STEPS = range(5, 7)
    SIZE = len(FIELDS)


def decide(options: StepOptions, sum_of_squares: float) -> Decision:
    """Unscaling and clipping, or a skip.

    A float32 squared is exact in float64 and can't overflow: the sum is finite exactly when all
    gradients are (float64 gradients above 1e154 count as overflow).
    """
    inv_scale = 1.0
    if options.grad_scale is not None:  # in a tensor, as Python's floats refuse to divide by zero
        inv_scale = options.grad_scale.float().double().reciprocal().item()
    grad_norm = math.sqrt(sum_of_squares) * inv_scale
    limit = options.max_grad_norm
    if options.clip is not None:
        clip, clip_state = options.clip
        limit = min(limit, clip.limit(clip_state, grad_norm))
    clip_coef = clip_coefficient(limit, grad_norm)
    nonfinite = options.skip_nonfinite and not math.isfinite(sum_of_squares)
    skip = nonfinite or options.asks_for_skip()
    return Decision(inv_scale, grad_norm, clip_coef, inv_scale * clip_coef, skip)
