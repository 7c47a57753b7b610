"""The base of every fused optimizer: torch's protocol around one fused step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from fusedopt import backends, checks, reference, state
from fusedopt.reference import Control, Group, Request, Rule

if TYPE_CHECKING:
    from fusedopt import _C

NonFinite = Literal["skip", "raise", "propagate"]
Backend = Literal["cuda", "cpu", "reference"]


class FusedOptimizer(Optimizer):
    """What all fused optimizers share, beside their torch twin's arguments and state.

    Keyword-only arguments, of every class:

    * `max_grad_norm` (float > 0, or None): clip the global L2 norm of all gradients of all groups:
      `coef = min(1, max_grad_norm / (norm + 1e-6))`, as `torch.nn.utils.clip_grad_norm_` does.
      inf measures and checks, but never clips.
    * `nonfinite`: what a gradient with inf or nan does. "skip" leaves every parameter and state as
      it was; "raise" does too, and raises `NonFiniteGradientError` naming the parameters (it waits
      for the device); "propagate" updates regardless, as torch does. None: "skip" where
      `max_grad_norm` is set, else "propagate".
    * `backend`: "cuda", "cpu", "reference" (plain torch), or None: by the parameters' device.

    The first two are attributes and may be changed between steps. `foreach`, `fused` and
    `capturable` are accepted and change nothing: the step is always fused and capturable.

    Parameters are float32, float64, bfloat16 or float16, of any shape and strides, on CPU and CUDA,
    in any mix. 16-bit ones are computed in float32 and rounded once.

    Raises:
        TypeError, ValueError, RuntimeError: an argument, a parameter, a gradient or a state is
            refused; the message names it. Nothing has been changed then.
    """

    rule: ClassVar[Rule]

    def _configure(self, max_grad_norm: Any, nonfinite: Any, backend: Any) -> None:
        """Takes our own arguments. Comes before torch's __init__, which adds the param groups."""
        # What can be set after construction lies in a dict: the wrapper that a trainer makes, of a
        # class derived from ours and delegating what it lacks, then writes here and not to itself.
        self._own: dict[str, Any] = {"control": None}
        self.max_grad_norm = max_grad_norm
        self.nonfinite = nonfinite
        self._backend = checks.check_choice("backend", backend, checks.BACKENDS)
        backends.choose(self._backend, [])
        self._plan: _C.Plan | None = None

    @property
    def max_grad_norm(self) -> float | None:
        """The largest global norm that is not clipped, or None."""
        return self._own["max_grad_norm"]

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None:
        self._own["max_grad_norm"] = checks.check_max_grad_norm(value)

    @property
    def nonfinite(self) -> NonFinite | None:
        """What a gradient with inf or nan does: "skip", "raise", "propagate", or None."""
        return self._own["nonfinite"]

    @nonfinite.setter
    def nonfinite(self, value: NonFinite | None) -> None:
        self._own["nonfinite"] = checks.check_choice("nonfinite", value, checks.NONFINITE_MODES)

    @property
    def grad_norm(self) -> Tensor:
        """The global gradient norm of the last step, unscaled, before clipping: 0-d float32."""
        return self._reading(Control.GRAD_NORM, torch.float32)

    @property
    def step_skipped(self) -> Tensor:
        """Whether the last step met inf or nan and changed nothing: 0-d bool."""
        return self._reading(Control.STEP_SKIPPED, torch.bool)

    @property
    def skipped_steps(self) -> Tensor:
        """How many steps have been skipped so far: 0-d int64."""
        return self._reading(Control.SKIPPED_STEPS, torch.int64)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """False: stock scalers unscale before the step, and no trainer refuses to clip."""
        return False

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        """torch's __init__ sets it for `fused=True`, which changes nothing here."""

    def _reading(self, index: int, dtype: torch.dtype) -> Tensor:
        return self._readings()[index].to(dtype, copy=True)

    def _readings(self) -> Tensor:
        """What the last step left (see `Control`), on the first parameter's device."""
        devices = (p.device for group in self.param_groups for p in group["params"])
        device = next(devices, torch.device("cpu"))
        control = self._own["control"]
        if control is None:
            control = torch.zeros(Control.SIZE, dtype=torch.float64, device=device)
        elif control.device != device:
            control = control.to(device)
        self._own["control"] = control
        return control

    def add_param_group(self, param_group: Group) -> None:
        super().add_param_group(param_group)
        try:
            self._check_group(len(self.param_groups) - 1)
        except Exception:
            self.param_groups.pop()
            raise

    def _check_group(self, index: int) -> None:
        group = self.param_groups[index]
        if group.get("differentiable"):
            raise RuntimeError(
                "differentiable=True is not supported: autograd can't look into a fused step"
            )
        for position, param in enumerate(group["params"]):
            name = checks.name_of(self.param_groups, index, position)
            checks.check_param(param, name, self._backend)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Checks, unscales, measures, clips and updates all parameters, or skips the step.

        Waits for no device, except with `nonfinite="raise"`.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What `closure` returned, if one was given.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._fused_step()
        return loss

    def _fused_step(self) -> None:
        request = self._request()
        control = self._readings()
        arguments = {**request._asdict(), "control": control}
        new_states: list[Tensor] = []
        if self._plan is None or not self._plan.step(self.param_groups, self.state, **arguments):
            self._plan, new_states = self._prepare()
            if self._plan is None:
                reference.step(self.rule, self.param_groups, self.state, request, control)
            elif not self._plan.step(self.param_groups, self.state, **arguments):
                raise RuntimeError("fusedopt: a new plan doesn't fit its parameters; please report")
        raises = self.nonfinite == "raise"
        # State comes with a parameter's first step that was not skipped, where the host can know.
        if new_states and (raises or control.device.type == "cpu") and self.step_skipped:
            self._forget(new_states)
        if raises and self._met_nonfinite(request, control):
            raise checks.NonFiniteGradientError(self._nonfinite_names())

    def _request(self) -> Request:
        """What this step is to do. A scaler sets `grad_scale` and `found_inf`, as torch's do."""
        mode = self.nonfinite or ("propagate" if self.max_grad_norm is None else "skip")
        scale = getattr(self, "grad_scale", None)
        found_inf = getattr(self, "found_inf", None)
        clips = self.max_grad_norm is not None
        return Request(
            max_grad_norm=self.max_grad_norm or math.inf,
            measure=clips or mode != "propagate" or scale is not None or found_inf is not None,
            skip_nonfinite=mode != "propagate",
            grad_scale=scale,
            found_inf=found_inf,
        )

    def _prepare(self) -> tuple[_C.Plan | None, list[Tensor]]:
        """Checks everything, then makes what is missing.

        Returns:
            A plan (None: the reference is to run), and the parameters whose state is new.
        """
        pairs = []
        for index, group in enumerate(self.param_groups):
            self._check_group(index)
            for position, param in enumerate(group["params"]):
                name = checks.name_of(self.param_groups, index, position)
                if param.grad is not None:
                    checks.check_grad(param, param.grad, name)
                if self.state.get(param):
                    checks.check_state(self.rule, group, param, self.state[param], name)
                pairs.append((group, param))
        backend = backends.choose(self._backend, (param.device for _, param in pairs))
        new_states = [
            param for group, param in pairs if state.complete(self.rule, group, param, self.state)
        ]
        try:
            plan = backends.new_plan(backend, self.rule, self.param_groups, self.state)
        except Exception:
            self._forget(new_states)
            raise
        return plan, new_states

    def _forget(self, params: list[Tensor]) -> None:
        for param in params:
            del self.state[param]

    @staticmethod
    def _met_nonfinite(request: Request, control: Tensor) -> bool:
        """Whether the step was skipped for its gradients, not because a scaler asked for it."""
        finite = math.isfinite(control[Control.SUM_OF_SQUARES].item())
        return not finite and not request.asks_for_skip()

    def _nonfinite_names(self) -> list[str]:
        if self._plan is not None:
            found = self._plan.nonfinite()
        else:
            found = [
                (g, i)
                for g, group in enumerate(self.param_groups)
                for i, param in enumerate(group["params"])
                if param.grad is not None
                and not reference.chunk_sums(param, param.grad).isfinite().all()
            ]
        return [checks.name_of(self.param_groups, g, i) for g, i in found]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_own": {**self._own}, "_backend": self._backend}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._plan = None  # load_state_dict comes here too: everything has moved
        super().__setstate__(state)
