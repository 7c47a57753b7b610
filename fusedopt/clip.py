"""Limits of the gradient norm that adapt themselves, for `max_grad_norm` of every optimizer.

    FusedAdamW(params, max_grad_norm=fusedopt.clip.ZScore())

They look at the norms of the steps before, on the device, without waiting for it. A step that is
skipped, or whose norm is inf or nan, never enters their statistics.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

_COUNT, _MEAN, _VARIANCE, _NORMS = range(4)  # of a state, and where the norms begin
_LIMIT = _MEAN


@dataclass(frozen=True)
class AdaptiveClip:
    """What adaptive limits share. Each has a state: float64, on the first parameter's device."""

    kind: ClassVar[int]
    max_norm: float = field(default=math.inf, kw_only=True)

    def __post_init__(self) -> None:
        if self.max_norm != math.inf:
            _check_range(self, "max_norm", 0, math.inf)

    def arguments(self) -> list[float]:
        """Its options, as the kernels know them; `max_norm` is a fixed limit's."""
        return [float(getattr(self, it.name)) for it in fields(self) if it.name != "max_norm"]

    def new_state(self, device: torch.device) -> Tensor:
        """Of a run that begins."""
        return torch.zeros(self._state_size(), dtype=torch.float64, device=device)

    def limit(self, state: Tensor, norm: float) -> float:
        """The largest norm that is not clipped, at a step with this norm; inf while warming up."""
        raise NotImplementedError

    def observe(self, state: Tensor, norm: float) -> None:
        """Takes the norm of a step that was not skipped into the statistics."""
        raise NotImplementedError

    def _state_size(self) -> int:
        return _NORMS


@dataclass(frozen=True)
class Percentile(AdaptiveClip):
    """Clips to a percentile of the norms of the last steps.

    AutoClip (Seetharaman, Wichern, Pardo and Le Roux, 2020, arXiv:2007.14469), whose default of 10
    is kept:

        limit_t = percentile(norm_{t-window}, ..., norm_{t-1})      interpolated linearly

    AutoClip takes it over the whole run, and of the current norm as well; here a window bounds the
    memory, and a spike doesn't raise its own limit.

    Args:
        percentile: from 0 to 100.
        window: over how many steps.
        warmup: so many norms come before there is a limit but `max_norm`.
        max_norm: a fixed limit, for all steps.

    Raises:
        TypeError, ValueError: an argument is no number, or outside of its range.
    """

    kind = 1

    percentile: float = 10.0
    window: int = 100
    warmup: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_range(self, "percentile", 0, 100)
        _check_whole(self, "window", 1, MAX_WINDOW)
        _check_whole(self, "warmup", 1, self.window)

    def limit(self, state: Tensor, norm: float) -> float:
        return math.inf if state[_COUNT] < self.warmup else state[_LIMIT].item()

    def observe(self, state: Tensor, norm: float) -> None:
        count = int(state[_COUNT])
        state[_NORMS + count % self.window] = norm
        state[_COUNT] = count + 1
        norms = sorted(state[_NORMS : _NORMS + min(count + 1, self.window)].tolist())
        position = float(len(norms) - 1) * (float(self.percentile) / 100)
        lower = norms[int(position)]
        upper = norms[min(int(position) + 1, len(norms) - 1)]
        state[_LIMIT] = lower + (upper - lower) * (position - int(position))

    def _state_size(self) -> int:
        return _NORMS + self.window


@dataclass(frozen=True)
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

    Args:
        alpha: how much of the statistics stays from step to step, from 0 to 1.
        threshold: of z, above 0.
        warmup: how many steps.
        eps: keeps z finite.
        max_norm: a fixed limit, for all steps; 1 in ZClip's own code.

    Raises:
        TypeError, ValueError: an argument is no number, or outside of its range.
    """

    kind = 2

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

    def observe(self, state: Tensor, norm: float) -> None:
        count, mean, variance = state[:_NORMS].tolist()
        clipped = min(norm, self.limit(state, norm))
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


MAX_WINDOW = 4096


def _check_range(clip: AdaptiveClip, name: str, low: float, high: float) -> None:
    value: Any = getattr(clip, name)
    what = f"{type(clip).__name__}'s {name}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{what} is a {type(value).__name__}; expected a number")
    if not low <= value <= high or (low == 0 and high == math.inf and not 0 < value < math.inf):
        bounds = "a finite number above 0" if high == math.inf else f"from {low} to {high}"
        raise ValueError(f"{what} is {value}; expected {bounds}")


def _check_whole(clip: AdaptiveClip, name: str, low: int, high: int) -> None:
    value: Any = getattr(clip, name)
    what = f"{type(clip).__name__}'s {name}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{what} is a {type(value).__name__}; expected an int")
    if not low <= value <= high:
        raise ValueError(f"{what} is {value}; expected from {low} to {high}")
