"""The decision of a step: unscale and clip the gradients, or skip."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor

from fusedopt.reference.coefficients import Decision, clip_coefficient
from fusedopt.reference.limits import AdaptiveClip


class StepOptions(NamedTuple):
    """The options of one call of `step()`, in addition to the hyperparameters in the groups."""

    max_grad_norm: float  # infinity: never clip
    measure: bool  # measure the norm before the update
    skip_nonfinite: bool  # change nothing if a gradient is inf or nan
    grad_scale: Tensor | None  # one float32; the gradients are divided by it
    found_inf: Tensor | None  # one float32; non-zero asks for a skip
    clip: tuple[AdaptiveClip, Tensor] | None = None  # an adaptive limit, and its state

    def for_kernels(self) -> tuple[Any, ...]:
        """The options as a compiled backend takes them."""
        if self.clip is None:
            return self
        limit, state = self.clip
        return (*self[:-1], (limit.kind, limit.arguments(), state))

    def asks_for_skip(self) -> bool:
        return self.found_inf is not None and self.found_inf.float().item() != 0


class Control:
    """The fields of the float64 tensor that a step writes its readings to, and their indices."""

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
    """Decides how to unscale and clip the gradients, or to skip the step.

    The square of a float32 is exact in float64 and can't overflow: the sum is finite exactly when
    all gradients are finite. (float64 gradients above 1e154 count as overflow.)
    """
    inv_scale = 1.0
    if options.grad_scale is not None:  # as a tensor: Python's floats refuse to divide by zero
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
