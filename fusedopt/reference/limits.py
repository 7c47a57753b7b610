"""Limits of the gradient norm that adapt themselves: their formulas and their statistics."""

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

_COUNT, _MEAN, _VARIANCE, _NORMS = range(4)  # indices into a state; the norms begin at _NORMS
_LIMIT = _MEAN


class AdaptiveClip:
    """The base of all limits. A limit has a state: float64, on the first parameter's device.

    The limits are dataclasses, but the base is not: jsonargparse accepts a class_path only where
    the declared class is no dataclass.

    The kernels know a limit by its `kind`, and its arguments by their order (csrc/core/limits.h).
    """

    kind: ClassVar[int]
    part: ClassVar[str | None] = None  # "parameter" or "row", if each has its own coefficient
    max_norm: float

    def __post_init__(self) -> None:
        if self.max_norm != math.inf:
            _check_range(self, "max_norm", 0, math.inf)

    @classmethod
    def argument_names(cls) -> list[str]:
        """The fields that the kernels get, in order. `max_norm` is a fixed limit of its own."""
        return [it.name for it in fields(cast(Any, cls)) if it.name != "max_norm"]

    def arguments(self) -> list[float]:
        """The values of `argument_names()`."""
        return [float(getattr(self, name)) for name in self.argument_names()]

    def label(self) -> str:
        """A text that is the same for equal limits. `repr` isn't: it tells 1 from 1.0."""
        values = [f"{it.name}={float(getattr(self, it.name))}" for it in fields(cast(Any, self))]
        return f"{type(self).__name__}({', '.join(values)})"

    def new_state(self, num_params: int, device: torch.device) -> Tensor:
        """The state at the beginning of a run."""
        return torch.zeros(self._state_shape(num_params), dtype=torch.float64, device=device)

    def resize(self, state: Tensor | None, num_params: int, device: torch.device) -> Tensor:
        """The state on `device` with room for `num_params` parameters; new ones start from 0."""
        if state is None:
            return self.new_state(num_params, device)
        state = state.to(device)
        if len(state) >= self._state_shape(num_params)[0]:
            return state
        new = self.new_state(num_params, device)
        new[: len(state)] = state
        return new

    def reorder(self, state: Tensor, before: list[Tensor], now: list[Tensor]) -> Tensor:
        """The state after the parameters have changed places: from `before` to `now`."""
        return state

    def limit(self, state: Tensor, norm: float) -> float:
        """The limit of the global norm at a step with the global norm `norm`; inf: no limit."""
        return math.inf

    def own_coef(
        self, state: Tensor, index: int, param: Tensor, decision: Decision
    ) -> float | Tensor:
        """The coefficient of one parameter's gradient; the global one counts if it is smaller.

        A tensor holds a coefficient per row: float64, in a shape that broadcasts.
        """
        return 1.0

    def observe(self, state: Tensor, params: list[Tensor | None], decision: Decision) -> None:
        """Adds a step to the statistics. It is called for steps that were not skipped."""

    def _state_shape(self, num_params: int) -> tuple[int, ...]:
        return (_NORMS,)


@dataclass(frozen=True)
class Percentile(AdaptiveClip):
    """Clips to a percentile of the norms of the last steps.

    This is AutoClip (Seetharaman, Wichern, Pardo and Le Roux, 2020, arXiv:2007.14469), with its
    default of 10:

        limit_t = percentile(norm_{t-window}, ..., norm_{t-1})      interpolated linearly

    AutoClip takes the percentile of all norms of the run, the current one included. Here a window
    bounds the memory, and the current norm is not included: a spike doesn't raise its own limit.

    Args:
        percentile: from 1 to 100, or 0, the smallest norm. 90, not 0.9.
        window: how many norms to keep, up to 4,096. On CUDA one block compares each of them with
            all others at every step.
        warmup: the number of steps before the limit begins. Until then only `max_norm` counts.
        max_norm: a fixed limit, for all steps.

    Raises:
        TypeError, ValueError: an argument is not a number, or is out of range.
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

    def observe(self, state: Tensor, params: list[Tensor | None], decision: Decision) -> None:
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

    This is ZClip (Kumar, Owen, Chowdhury and Güra, 2025, arXiv:2504.02507), with its defaults and
    its reciprocal clipping:

        z = (norm - mean) / (std + eps)
        limit = mean + threshold^2 / z * std                        where z > threshold, else none
        mean = alpha mean + (1 - alpha) min(norm, limit)
        var = alpha var + (1 - alpha) (min(norm, limit) - mean)^2

    The statistics start with the mean and variance of the first `warmup` steps. Set `max_norm` if
    gradients may explode from the start: the first steps have no other limit.

    Args, all by keyword:
        alpha: the share of the statistics that stays from step to step, from 0 to 1.
        threshold: of z, above 0.
        warmup: how many steps.
        eps: keeps z finite.
        max_norm: a fixed limit, for all steps; 1 in ZClip's own code.

    Raises:
        TypeError, ValueError: an argument is not a number, or is out of range.
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

    def observe(self, state: Tensor, params: list[Tensor | None], decision: Decision) -> None:
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

    This is AdaGC (Wang et al., 2025, arXiv:2502.11034), with its defaults. For a parameter's
    gradient g:

        coef = min(1, threshold average / |g|)
        average = beta average + (1 - beta) coef |g|

    While a parameter warms up, the global norm is clipped to `warmup_norm` instead, and
    `average` is the smallest norm so far (after clipping).

    In AdaGC all parameters warm up in the run's first steps. Here each parameter warms up in its
    own first steps with a gradient, so that layers may join later. A gradient of zeros is ignored:
    an average of zero would clip all later gradients to zero.

    Args:
        threshold: how many times its average a norm may be.
        beta: the share of an average that stays from step to step, from 0 to 1.
        warmup: the number of steps that a parameter warms up.
        warmup_norm: the limit of the global norm while a parameter warms up.
        max_norm: a fixed limit of the global norm, for all steps. The smaller of the two
            coefficients counts.

    Raises:
        TypeError, ValueError: an argument is not a number, or is out of range.
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
        if norm == 0:  # such a tensor never warms up; its coefficient must not be the smallest
            return 1.0
        count, average = state[index].tolist()
        if count < self.warmup:
            return clip_coefficient(self.warmup_norm, decision.grad_norm)
        limit = self.threshold * average
        return limit / norm if norm > limit else 1.0

    def observe(self, state: Tensor, params: list[Tensor | None], decision: Decision) -> None:
        for index, param in enumerate(params):
            if param is None or param.grad is None:
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
    """The norm of a parameter's unscaled gradient."""
    assert param.grad is not None
    return norms.grad_norm(cast_grad(param.grad, param), param).item() * decision.inv_scale


@dataclass(frozen=True)
class Unit(AdaptiveClip):
    """Clips every row of a gradient by the norm of the parameter's row.

    This is AGC (Brock, De, Smith and Simonyan, 2021, arXiv:2102.06171), with its defaults. For a
    row's weights w and gradient g:

        coef = min(1, clipping max(|w|, eps) / |g|)

    One index of the first dimension selects a row: a row of a linear layer, a filter of a
    convolution. A parameter with fewer than two dimensions is a single row. AGC does not clip the
    last linear layer: put it in a param group with `"clipped": False`. On the device, a row takes
    24 bytes of memory.

    Args:
        clipping: how many times its weights' norm a gradient's norm may be. 0.01 suits batches of
            4,096; smaller batches need more.
        eps: weights with a smaller norm count as if it were `eps`, so that weights can grow from 0.
        max_norm: a fixed limit of the global norm. The smaller of the two coefficients counts.

    Raises:
        TypeError, ValueError: an argument is not a number, or is out of range. Setting the limit
            also raises if a parameter's rows are not contiguous in memory, such as a transposed
            parameter's.
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


LIMITS = (Percentile, ZScore, PerTensor, Unit)  # the kernels know no others
MAX_WINDOW = 4096


def _check_range(clip: AdaptiveClip, name: str, low: float, high: float) -> None:
    value: Any = getattr(clip, name)
    what = f"{type(clip).__name__}'s {name}"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{what} is a {type(value).__name__}; expected a number")
    if type(value) is not int:  # with NumPy's float32, formulas would run in single precision
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
