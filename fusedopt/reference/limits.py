"""Limits of the gradient norm that adapt themselves: their formulas, and what they learn."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from fusedopt.reference import norms
from fusedopt.reference.arithmetic import cast_grad
from fusedopt.reference.coefficients import Decision, clip_coefficient, smaller

_COUNT, _MEAN, _VARIANCE, _NORMS = range(4)  # of a state, and where the norms begin
_LIMIT = _MEAN


class AdaptiveClip:
    """What all limits share. Each has a state: float64, on the first parameter's device.

    It is no dataclass, as they are: jsonargparse takes a class_path only for what is none.

    The kernels know each by its `kind`, and its arguments by their order
    (csrc/core/limits.h).
    """

    kind: ClassVar[int]
    part: ClassVar[str | None] = None  # what has a coefficient of its own, in a word
    max_norm: float

    def __post_init__(self) -> None:
        if self.max_norm != math.inf:
            _check_range(self, "max_norm", 0, math.inf)

    def arguments(self) -> list[float]:
        """Its options, as the kernels know them; `max_norm` is a fixed limit's."""
        return [
            float(getattr(self, it.name)) for it in fields(cast(Any, self)) if it.name != "max_norm"
        ]

    def label(self) -> str:
        """The same for equal limits, as `repr`, which tells 1 from 1.0, is not."""
        values = [f"{it.name}={float(getattr(self, it.name))}" for it in fields(cast(Any, self))]
        return f"{type(self).__name__}({', '.join(values)})"

    def new_state(self, num_params: int, device: torch.device) -> Tensor:
        """Of a run that begins."""
        return torch.zeros(self._state_shape(num_params), dtype=torch.float64, device=device)

    def resize(self, state: Tensor | None, num_params: int, device: torch.device) -> Tensor:
        """What is known, for at least so many parameters on that device; new ones learn anew."""
        if state is None:
            return self.new_state(num_params, device)
        state = state.to(device)
        if len(state) >= self._state_shape(num_params)[0]:
            return state
        new = self.new_state(num_params, device)
        new[: len(state)] = state
        return new

    def reorder(self, state: Tensor, before: list[Tensor], now: list[Tensor]) -> Tensor:
        """What is known, when the parameters have other places than before."""
        return state

    def limit(self, state: Tensor, norm: float) -> float:
        """The largest global norm that is not clipped, at a step with this one; inf: none."""
        return math.inf

    def own_coef(
        self, state: Tensor, index: int, param: Tensor, decision: Decision
    ) -> float | Tensor:
        """What a parameter's gradient is multiplied by, unless the global limit asks for less.

        A tensor stands for a coefficient per row, float64, in a shape that broadcasts.
        """
        return 1.0

    def observe(self, state: Tensor, params: list[Tensor], decision: Decision) -> None:
        """Takes a step that was not skipped into the statistics."""

    def _state_shape(self, num_params: int) -> tuple[int, ...]:
        return (_NORMS,)


@dataclass(frozen=True)
class Percentile(AdaptiveClip):
    """Clips to a percentile of the norms of the last steps.

    AutoClip (Seetharaman, Wichern, Pardo and Le Roux, 2020, arXiv:2007.14469), whose default of 10
    is kept:

        limit_t = percentile(norm_{t-window}, ..., norm_{t-1})      interpolated linearly

    AutoClip takes it over the whole run, and of the current norm as well; here a window bounds the
    memory, and a spike doesn't raise its own limit.

    Args:
        percentile: from 1 to 100, or 0, the smallest norm. 90, not 0.9.
        window: over how many steps, up to 4,096. On CUDA one block compares all of them with each
            other at every step.
        warmup: so many norms come before there is a limit but `max_norm`.
        max_norm: a fixed limit, for all steps.

    Raises:
        TypeError, ValueError: an argument is no number, or outside of its range.
    """

    kind = 1

    max_norm: float = field(default=math.inf, kw_only=True)
    percentile: float = 10.0
    window: int = 100
    warmup: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_range(self, "percentile", 0, 100)
        if 0 < self.percentile < 1:
            raise ValueError(
                f"Percentile's percentile is {self.percentile}; expected from 1 to 100 (or 0): "
                f"{self.percentile * 100:g}?"
            )
        _check_whole(self, "window", 1, MAX_WINDOW)
        _check_whole(self, "warmup", 1, self.window)

    def limit(self, state: Tensor, norm: float) -> float:
        return math.inf if state[_COUNT] < self.warmup else state[_LIMIT].item()

    def observe(self, state: Tensor, params: list[Tensor], decision: Decision) -> None:
        count = int(state[_COUNT])
        state[_NORMS + count % self.window] = decision.grad_norm
        state[_COUNT] = count + 1
        recent = sorted(state[_NORMS : _NORMS + min(count + 1, self.window)].tolist())
        position = float(len(recent) - 1) * (float(self.percentile) / 100)
        lower = recent[int(position)]
        upper = recent[min(int(position) + 1, len(recent) - 1)]
        state[_LIMIT] = lower + (upper - lower) * (position - int(position))

    def _state_shape(self, num_params: int) -> tuple[int, ...]:
        return (_NORMS + self.window,)


@dataclass(frozen=True, kw_only=True)
class ZScore(AdaptiveClip):
    """Clips norms that lie too many standard deviations above their running mean.

    ZClip (Kumar, Owen, Chowdhury and Güra, 2025, arXiv:2504.02507), with its defaults and its
    reciprocal clipping:

        z = (norm - mean) / (std + eps)
        limit = mean + threshold^2 / z * std                        where z > threshold, else none
        mean = alpha mean + (1 - alpha) min(norm, limit)
        var = alpha var + (1 - alpha) (min(norm, limit) - mean)^2

    The mean and variance of the first `warmup` steps begin the statistics. Gradients that explode
    from the very start need a `max_norm`: these steps have no other limit.

    Args, all by keyword:
        alpha: how much of the statistics stays from step to step, from 0 to 1.
        threshold: of z, above 0.
        warmup: how many steps.
        eps: keeps z finite.
        max_norm: a fixed limit, for all steps; 1 in ZClip's own code.

    Raises:
        TypeError, ValueError: an argument is no number, or outside of its range.
    """

    kind = 2

    max_norm: float = field(default=math.inf, kw_only=True)
    alpha: float = 0.97
    threshold: float = 2.5
    warmup: int = 25
    eps: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_range(self, "alpha", 0, 1)
        _check_range(self, "threshold", 0, math.inf)
        _check_whole(self, "warmup", 1, 2**53)
        _check_range(self, "eps", 0, math.inf)

    def limit(self, state: Tensor, norm: float) -> float:
        count, mean, variance = state[:_NORMS].tolist()
        if count < self.warmup:
            return math.inf
        deviation = math.sqrt(variance)
        z = (norm - mean) / (deviation + self.eps)
        if not z > self.threshold:
            return math.inf
        return mean + (self.threshold * deviation) / (z / self.threshold)

    def observe(self, state: Tensor, params: list[Tensor], decision: Decision) -> None:
        count, mean, variance = state[:_NORMS].tolist()
        clipped = min(decision.grad_norm, self.limit(state, decision.grad_norm))
        if count < self.warmup:  # Welford (1962): the variance, times the count
            before = clipped - mean
            mean += before / (count + 1)
            variance += before * (clipped - mean)
            if count + 1 >= self.warmup:
                variance /= count + 1
        else:
            mean = self.alpha * mean + (1 - self.alpha) * clipped
            distance = clipped - mean
            variance = self.alpha * variance + (1 - self.alpha) * (distance * distance)
        state[:_NORMS] = state.new_tensor((count + 1, mean, variance))


@dataclass(frozen=True)
class PerTensor(AdaptiveClip):
    """Clips every parameter's gradient by a running average of its own norms.

    AdaGC (Wang et al., 2025, arXiv:2502.11034), with its defaults. Of a parameter's gradient g:

        coef = min(1, threshold average / |g|)
        average = beta average + (1 - beta) coef |g|

    While a parameter warms up, the global norm is clipped to `warmup_norm` instead, and
    `average` is the smallest norm so far (after clipping).

    In AdaGC all parameters warm up in the run's first steps; here each does so in the first ones
    that have a gradient for it, so that layers may join later. A gradient of zeros teaches nothing:
    an average of zero would clip everything that follows to zero.

    Args:
        threshold: how many times its average a norm may be.
        beta: how much of an average stays from step to step, from 0 to 1.
        warmup: how many steps.
        warmup_norm: the limit of the global norm meanwhile.
        max_norm: a fixed limit of the global norm, for all steps. Of the two coefficients the
            smaller one counts.

    Raises:
        TypeError, ValueError: an argument is no number, or outside of its range.
    """

    kind = 3
    part = "parameter"

    max_norm: float = field(default=math.inf, kw_only=True)
    threshold: float = 1.05
    beta: float = 0.98
    warmup: int = 100
    warmup_norm: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_range(self, "threshold", 0, math.inf)
        _check_range(self, "beta", 0, 1)
        _check_whole(self, "warmup", 1, 2**53)
        _check_range(self, "warmup_norm", 0, math.inf)

    def own_coef(self, state: Tensor, index: int, param: Tensor, decision: Decision) -> float:
        norm = _grad_norm(param, decision)
        if norm == 0:  # it never warms up, and is not to be the smallest coefficient
            return 1.0
        count, average = state[index].tolist()
        if count < self.warmup:
            return clip_coefficient(self.warmup_norm, decision.grad_norm)
        limit = self.threshold * average
        return limit / norm if norm > limit else 1.0

    def observe(self, state: Tensor, params: list[Tensor], decision: Decision) -> None:
        for index, param in enumerate(params):
            if param.grad is None:
                continue
            own = self.own_coef(state, index, param, decision)
            clipped = _grad_norm(param, decision) * smaller(own, decision.clip_coef)
            if clipped == 0:
                continue
            count, average = state[index].tolist()
            if count >= self.warmup:
                average = self.beta * average + (1 - self.beta) * clipped
            elif count == 0 or clipped < average:
                average = clipped
            state[index] = state.new_tensor((count + 1, average))

    def reorder(self, state: Tensor, before: list[Tensor], now: list[Tensor]) -> Tensor:
        rows = {id(param): row for param, row in zip(before, state, strict=False)}
        new = self.new_state(len(now), state.device)
        for place, param in enumerate(now):
            if id(param) in rows:
                new[place] = rows[id(param)]
        return new

    def _state_shape(self, num_params: int) -> tuple[int, ...]:
        return (num_params, 2)


def _grad_norm(param: Tensor, decision: Decision) -> float:
    """A parameter's, unscaled."""
    norm = norms.norm_of_chunks(norms.chunk_sums(param, param.grad))
    return norm.item() * decision.inv_scale


@dataclass(frozen=True)
class Unit(AdaptiveClip):
    """Clips every row of a gradient by the norm of the parameter's row.

    AGC (Brock, De, Smith and Simonyan, 2021, arXiv:2102.06171), with its defaults. Of a unit's
    weights w and gradient g:

        coef = min(1, clipping max(|w|, eps) / |g|)

    A unit is what one index of the first dimension selects: a row of a linear layer, a filter of a
    convolution. A parameter of fewer than two dimensions is a unit by itself. AGC leaves the last
    linear layer alone: give it an optimizer without this limit. On the device, a unit takes 24
    bytes of memory.

    Args:
        clipping: how many times its weights' norm a gradient's may be; 0.01 for batches of 4,096,
            more for smaller ones.
        eps: the least norm of weights that counts, so that those that start from zero can grow.
        max_norm: a fixed limit of the global norm. Of the two coefficients the smaller one counts.

    Raises:
        TypeError, ValueError: an argument is no number, or outside of its range; or (where it is
            set) a parameter's rows are not contiguous in memory, as a transposed one's are not.
    """

    kind = 4
    part = "row"

    max_norm: float = field(default=math.inf, kw_only=True)
    clipping: float = 0.01
    eps: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_range(self, "clipping", 0, math.inf)
        _check_range(self, "eps", 0, math.inf)

    def own_coef(self, state: Tensor, index: int, param: Tensor, decision: Decision) -> Tensor:
        assert param.grad is not None
        weights = norms.unit_norms(param, param)
        limits = self.clipping * weights.where(weights > self.eps, self.eps)
        grad_norms = norms.unit_norms(cast_grad(param.grad, param), param) * decision.inv_scale
        coefs = torch.where(grad_norms > limits, limits / grad_norms, 1.0)
        return coefs.view(-1, *[1] * (param.dim() - 1)) if param.dim() > 1 else coefs.view(())

    def _state_shape(self, num_params: int) -> tuple[int, ...]:
        return (0,)


LIMITS = (Percentile, ZScore, PerTensor, Unit)  # others, the kernels don't know
MAX_WINDOW = 4096


def _check_range(clip: AdaptiveClip, name: str, low: float, high: float) -> None:
    value: Any = getattr(clip, name)
    what = f"{type(clip).__name__}'s {name}"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{what} is a {type(value).__name__}; expected a number")
    if type(value) is not int:  # NumPy's float32 would make single precision of the formulas
        object.__setattr__(clip, name, value := float(value))
    if not low <= value <= high or (low == 0 and high == math.inf and not 0 < value < math.inf):
        bounds = "a finite number above 0" if high == math.inf else f"from {low} to {high}"
        raise ValueError(f"{what} is {value}; expected {bounds}")


def _check_whole(clip: AdaptiveClip, name: str, low: int, high: int) -> None:
    value: Any = getattr(clip, name)
    what = f"{type(clip).__name__}'s {name}"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{what} is a {type(value).__name__}; expected an int")
    object.__setattr__(clip, name, value := int(value))
    if not low <= value <= high:
        raise ValueError(f"{what} is {value}; expected from {low} to {high}")
