"""Gradient scaling for mixed precision, without a separate pass over the gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState
from torch.optim import Optimizer

from fusedopt.core import sharding
from fusedopt.core.nonfinite import NonFiniteGradientError
from fusedopt.core.optimizer import FusedOptimizer
from fusedopt.core.skip_limit import TooManySkipsError


class GradScaler(torch.amp.GradScaler):
    """A `torch.amp.GradScaler` whose `step` makes only the fused step of a fused optimizer.

    torch's scaler reads and writes all gradients to unscale and check them, and waits for the
    result. Here the step itself checks, unscales, clips and updates, or skips. `update` then looks
    whether the step was skipped. `max_grad_norm` limits the norm of the unscaled gradients. The
    gradients stay scaled, unless you call `unscale_`, which works as torch's does. An overflow
    skips the step in every `nonfinite` mode, and never raises.

    Gradients may become inf or nan after `unscale_` has found them finite. This is no overflow of
    the scale, so `nonfinite="raise"` raises; in every other mode the step is skipped. `update`
    lowers the scale in both cases, and also after any other error that ends a skipped step.

    It handles every other optimizer as torch's class does. The arguments are torch's.
    """

    def step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """Steps with the gradients divided by the scale, or skips if they hold inf or nan.

        Args:
            optimizer: the optimizer to step. Its gradients come from a scaled loss.
            args, kwargs: the arguments of `optimizer.step`. A closure is refused.

        Raises:
            NonFiniteGradientError: gradients became inf or nan after `unscale_`, with
                `nonfinite="raise"`.
            TooManySkipsError: `max_consecutive_skips` steps in a row were skipped.
            RuntimeError: a closure was given, or this optimizer has stepped since `update`.
            AssertionError: there is no gradient.
        """
        if not (self._enabled and isinstance(optimizer, FusedOptimizer)):
            return super().step(optimizer, *args, **kwargs)
        if "closure" in kwargs or any(arg is not None for arg in args):
            raise RuntimeError("Closure use is not currently supported if GradScaler is enabled.")
        sharding.refuse(optimizer._own["sharded"], "fusedopt.GradScaler")
        self._check_scale_growth_tracker("step")
        state = self._per_optimizer_states[id(optimizer)]
        if state["stage"] is OptState.STEPPED:
            raise RuntimeError("step() has already been called since the last update().")
        no_grads = all(p.grad is None for group in optimizer.param_groups for p in group["params"])
        if (
            no_grads and optimizer._find_ranks("fusedopt.GradScaler") is None
        ):  # other ranks would wait for this one
            raise AssertionError("No inf checks were recorded for this optimizer.")

        with self._set_on(optimizer, state):
            try:
                result = optimizer.step(*args, **kwargs)
            except (NonFiniteGradientError, TooManySkipsError):
                self._note_step(optimizer, state)
                raise
        self._note_step(optimizer, state)
        return result

    @contextmanager
    def _set_on(self, optimizer: FusedOptimizer, state: dict[str, Any]) -> Iterator[None]:
        """Sets the scale, or its finding of inf and nan, on the optimizer during a step."""
        grad_scale, found_inf = getattr(optimizer, "grad_scale", None), optimizer.found_inf
        if state["stage"] is OptState.UNSCALED:
            optimizer.found_inf = self._found_inf(state["found_inf_per_device"])
            optimizer.skips_for_scaler = optimizer.nonfinite != "raise"
        else:
            scale = self._get_scale_async()
            assert scale is not None
            optimizer.grad_scale = scale if grad_scale is None else scale * grad_scale
            optimizer.skips_for_scaler = True
        try:
            yield
        finally:
            optimizer.skips_for_scaler = False
            optimizer.grad_scale, optimizer.found_inf = grad_scale, found_inf

    @staticmethod
    def _note_step(optimizer: FusedOptimizer, state: dict[str, Any]) -> None:
        """Records for `update` whether the step was skipped."""
        skipped = optimizer.step_skipped
        state["found_inf_per_device"] = {skipped.device: skipped.float()}
        state["stage"] = OptState.STEPPED

    def _found_inf(self, per_device: dict[torch.device, Tensor]) -> Tensor:
        """A number that is not zero if any device found inf or nan."""
        assert self._scale is not None
        device = self._scale.device
        return torch.stack(
            [found.to(device, non_blocking=True) for found in per_device.values()]
        ).sum()
