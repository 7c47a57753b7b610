"""Gradient scaling for mixed precision, without a pass of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState
from torch.optim import Optimizer

from fusedopt.core.optimizer import FusedOptimizer


class GradScaler(torch.amp.GradScaler):
    """A `torch.amp.GradScaler` whose `step` of a fused optimizer is the fused step, and no more.

    torch's own reads and writes all gradients to unscale and check them, and waits for the result.
    Here the step itself checks, unscales, clips and updates, or skips; `update` then sees whether
    it did. `max_grad_norm` limits the norm of the unscaled gradients. The gradients stay scaled,
    unless `unscale_` is called, which works as torch's does. An overflow skips the step in every
    `nonfinite` mode, and never raises.

    Every other optimizer is handled as torch's class does. The arguments are torch's.
    """

    def step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """Steps with the gradients divided by the scale, or skips where they hold inf or nan.

        Args:
            optimizer: whose gradients come from a scaled loss.
            args, kwargs: for `optimizer.step`, which may not be given a closure.

        Raises:
            RuntimeError: a closure was given, or this optimizer has stepped since `update`.
            AssertionError: there is no gradient.
        """
        if not (self._enabled and isinstance(optimizer, FusedOptimizer)):
            return super().step(optimizer, *args, **kwargs)
        if "closure" in kwargs or any(arg is not None for arg in args):
            raise RuntimeError("Closure use is not currently supported if GradScaler is enabled.")
        self._check_scale_growth_tracker("step")
        state = self._per_optimizer_states[id(optimizer)]
        if state["stage"] is OptState.STEPPED:
            raise RuntimeError("step() has already been called since the last update().")
        if all(p.grad is None for group in optimizer.param_groups for p in group["params"]):
            raise AssertionError("No inf checks were recorded for this optimizer.")

        unscaled = state["stage"] is OptState.UNSCALED
        own_scale = optimizer.grad_scale
        if unscaled:
            optimizer.found_inf = self._found_inf(state["found_inf_per_device"])
        else:
            scale = self._get_scale_async()
            assert scale is not None
            optimizer.grad_scale = scale if own_scale is None else scale * own_scale
        optimizer.skips_for_scaler = True
        try:
            result = optimizer.step(*args, **kwargs)
        finally:
            optimizer.skips_for_scaler = False
            optimizer.found_inf = None
            optimizer.grad_scale = own_scale
        if not unscaled:
            skipped = optimizer.step_skipped
            state["found_inf_per_device"] = {skipped.device: skipped.float()}
        state["stage"] = OptState.STEPPED
        return result

    def _found_inf(self, per_device: dict[torch.device, Tensor]) -> Tensor:
        """Not zero where any of the devices found inf or nan."""
        assert self._scale is not None
        device = self._scale.device
        return torch.stack(
            [found.to(device, non_blocking=True) for found in per_device.values()]
        ).sum()
