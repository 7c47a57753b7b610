"""The base of every fused optimizer: torch's protocol around one fused step."""

from __future__ import annotations

import math
import operator
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from fusedopt import reference
from fusedopt.core import backends, checks, state
from fusedopt.core.fallback import TorchPlan
from fusedopt.core.names import ParamNames
from fusedopt.core.persistence import Persistence
from fusedopt.core.settings import NonFinite
from fusedopt.core.skip_limit import SkipLimit, TooManySkipsError
from fusedopt.reference import Control, Group, StepOptions, norms
from fusedopt.reference.groups import name_of
from fusedopt.reference.limits import AdaptiveClip
from fusedopt.telemetry import Rings, explain

if TYPE_CHECKING:
    from fusedopt import _C

Backend = Literal["cuda", "cpu", "reference"]


class FusedOptimizer(Persistence):
    """What all fused optimizers share, beside their torch twin's arguments and state.

    Keyword-only arguments, of every class:

    * `max_grad_norm` (float > 0, or None): clip the global L2 norm of all gradients of all groups:
      `coef = min(1, max_grad_norm / (norm + 1e-6))`, as `torch.nn.utils.clip_grad_norm_` does.
      inf measures and checks, but never clips. Or a limit of `fusedopt.clip`: `Percentile()` and
      `ZScore()` follow the norms of earlier steps, `PerTensor()` those of each parameter, and
      `Unit()` compares rows of gradients with rows of weights.
    * `nonfinite`: what a gradient with inf or nan does. "skip" leaves every parameter and state as
      it was; "raise" does too, and raises `NonFiniteGradientError` naming the parameters (it waits
      for the device); "propagate" updates regardless, as torch does. None: "skip" where
      `max_grad_norm` is set, else "propagate".
    * `backend`: "cuda", "cpu", "reference" (plain torch), or None: by the parameters' device.
    * `telemetry` (int > 0, or None): how many steps to keep measurements of, for `telemetry()` and
      `explain()`, on the parameters' devices: 48 bytes per step and parameter.
    * `max_consecutive_skips` (int > 0, or None): after so many skipped steps in a row, `step()`
      raises `TooManySkipsError`. It doesn't wait for a GPU, and may notice some steps later.

    All but `backend` and `telemetry` are attributes and may be changed between steps. `foreach`,
    `fused` and `capturable` are accepted where the twin has them, and change nothing: the step is
    always fused and capturable.

    Parameters are float32, float64, bfloat16 or float16, of any shape and strides, on CPU and CUDA,
    in any mix. 16-bit ones are computed in float32 and rounded once.

    Raises:
        TypeError, ValueError, RuntimeError: an argument, a parameter, a gradient or a state is
            refused; the message names it. Nothing has been changed then.
    """

    # Set by a scaler while it steps: the gradients are to be divided by the one, and the step is
    # skipped if the other is not zero. Both are one float32.
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    # An overflow is a scaler's daily business: it skips, whatever `nonfinite` says.
    skips_for_scaler = False

    def _configure(
        self,
        max_grad_norm: Any,
        nonfinite: Any,
        backend: Any,
        telemetry: Any,
        max_consecutive_skips: Any,
    ) -> None:
        """Takes our own arguments. Comes before torch's __init__, which adds the param groups."""
        self._own = {"control": None, "clip_state": None, "clip_params": None, "loaded_steps": 0}
        self._names = ParamNames()
        self._lock = threading.RLock()
        self.max_grad_norm = max_grad_norm
        self.nonfinite = nonfinite
        self.max_consecutive_skips = max_consecutive_skips
        kept_steps = checks.check_count("telemetry", telemetry)
        self._rings = None if kept_steps is None else Rings(kept_steps)
        self._backend = checks.check_choice("backend", backend, checks.BACKENDS)
        backends.choose(self._backend, [])
        self._plan = None
        self._counters: dict[Tensor, Tensor] = {}  # by parameter: see `Rule.hidden_step`
        self._provisional_state: list[Tensor] = []

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """False: stock scalers unscale before the step, and no trainer refuses to clip."""
        return False

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        """torch's __init__ sets it for `fused=True`, which changes nothing here."""

    def _count_of(self, param: Tensor) -> Tensor | None:
        """How many steps a parameter's state has been through."""
        if self.rule.hidden_step:
            return self._counters.get(param)
        return self.state.get(param, {}).get(self.rule.counter)

    def add_param_group(self, param_group: Group) -> None:
        super().add_param_group(param_group)
        self._follow_names()
        try:
            self._check_group(len(self.param_groups) - 1)
        except Exception:
            self.param_groups.pop()
            raise

    def _check_group(self, index: int) -> None:
        group = self.param_groups[index]
        checks.check_options(index, group, self.defaults)
        for position, param in enumerate(group["params"]):
            name = name_of(self.param_groups, index, position)
            checks.check_param(param, name, self._backend)
            checks.check_rows(self.max_grad_norm, param, name)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Checks, unscales, measures, clips and updates all parameters, or skips the step.

        Waits for no device, except with `nonfinite="raise"`, for a norm over parameters on CPU and
        CUDA, and for tensors on CUDA among the hyperparameters, other than `lr`.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What `closure` returned, if one was given.

        Raises:
            NonFiniteGradientError: gradients held inf or nan, with `nonfinite="raise"`.
            TooManySkipsError: `max_consecutive_skips` steps in a row were skipped.
            TypeError, ValueError, RuntimeError: a parameter, a gradient, a state or an option is
                refused, or a step that is captured in a CUDA graph would have to make state; the
                message names it. Nothing has been changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            _untraced_step(self)
        else:
            self._locked_step()
        return loss

    def _locked_step(self) -> None:
        """While a large step lets other threads run, none of them enters this optimizer."""
        with self._lock:
            self._fused_step()

    def _fused_step(self) -> None:
        mode = self._nonfinite_mode()
        options = self._step_options(mode)
        control = self._readings()
        new_states: list[Tensor] = []
        if self._plan is None or not self._plan.step(
            self.param_groups, self.state, *options.for_kernels(), control=control
        ):
            self._plan, new_states = self._prepare()
            options = self._step_options(mode)  # a limit's state may have moved
            if self._plan is None:
                reference.step(
                    self.rule,
                    self.param_groups,
                    self.state,
                    self._counters,
                    options,
                    control,
                    self._rings,
                )
            elif not self._plan.step(
                self.param_groups, self.state, *options.for_kernels(), control=control
            ):
                raise RuntimeError("fusedopt: a new plan doesn't fit its parameters; please report")
        raises = mode == "raise"
        # State comes with a parameter's first step that was not skipped, as far as the host knows.
        if new_states and not (raises or control.device.type == "cpu"):
            self._provisional_state += new_states
        elif new_states and self.step_skipped:
            self._drop_state(new_states)
        if raises and self._met_nonfinite(options, control):
            raise self._nonfinite_error()
        limit: SkipLimit | None = self._own["skip_limit"]
        if limit is not None and limit.exceeded(control):
            raise TooManySkipsError(
                f"{limit.limit} steps in a row were skipped (max_consecutive_skips): "
                f"{self.explain()}"
            )

    def _step_options(self, mode: NonFinite) -> StepOptions:
        """What this step is to do. A scaler sets `grad_scale` and `found_inf`, as torch's do."""
        scaled = self.grad_scale is not None or self.found_inf is not None
        limit = self.max_grad_norm
        clip = None
        if isinstance(limit, AdaptiveClip):
            limit, clip = limit.max_norm, (limit, self._clip_state(limit))
        return StepOptions(
            max_grad_norm=math.inf if limit is None else limit,
            measure=self.max_grad_norm is not None or mode != "propagate" or scaled,
            skip_nonfinite=mode != "propagate",
            grad_scale=self.grad_scale,
            found_inf=self.found_inf,
            clip=clip,
        )

    @torch.inference_mode(False)
    def _clip_state(self, clip: AdaptiveClip) -> Tensor:
        """What an adaptive limit has learned, on the first parameter's device."""
        device = self._readings().device
        num_params = sum(len(group["params"]) for group in self.param_groups)
        before = self._own["clip_state"]
        state = clip.resize(before, num_params, device)
        if state is not before and state.numel() > 0:
            checks.check_new_state(str(clip), "a step with this max_grad_norm")
        self._own["clip_state"] = state
        return state

    def _move_clip_state(self) -> None:
        """What a limit has learned of a parameter goes along with it to another place."""
        limit, state, before = (
            self.max_grad_norm,
            self._own["clip_state"],
            self._own["clip_params"],
        )
        params = [param for _, param in reference.distinct_params(self.param_groups)]
        if isinstance(limit, AdaptiveClip) and state is not None and before is not None:
            same = len(before) == len(params) and all(map(operator.is_, before, params))
            if not same:
                self._own["clip_state"] = limit.reorder(state, before, params)
        self._own["clip_params"] = params

    def _nonfinite_mode(self) -> NonFinite:
        if self.skips_for_scaler:
            return "skip"
        return self.nonfinite or ("propagate" if self.max_grad_norm is None else "skip")

    @torch.inference_mode(False)
    @torch.no_grad()
    def _prepare(self) -> tuple[_C.Plan | TorchPlan | None, list[Tensor]]:
        """Checks everything, then makes what is missing.

        Returns:
            A plan (None: the reference is to run), and the parameters whose state is new.
        """
        pairs = []
        self._follow_names()
        for index, group in enumerate(self.param_groups):
            self._check_group(index)
            for position, param in enumerate(group["params"]):
                name = name_of(self.param_groups, index, position)
                if param.grad is not None:
                    checks.check_grad(param, param.grad, name)
                if not state.is_empty(self.state.get(param)):
                    checks.check_state(self.rule, group, param, self.state[param], name)
                    checks.check_state_dtypes(self.rule, group, param, self.state[param], name)
                elif param.grad is not None and (self.rule.scalars or self.rule.states(group)):
                    checks.check_new_state(name, "a step with its gradient")
                pairs.append((group, param))
        devices = (param.device for _, param in pairs)
        backend = backends.choose(self._backend, devices, self._only_exact())
        new_states = [
            param
            for group, param in pairs
            if state.complete(self.rule, group, param, self.state, self._counters)
        ]
        self._move_clip_state()
        if self._rings is not None:
            self._rings.resize(self.param_groups)
        rings = [] if self._rings is None else self._rings.tensors()
        try:
            plan = backends.new_plan(
                backend, self.rule, self.param_groups, self.state, self._counters, rings
            )
        except Exception:
            self._drop_state(new_states)
            raise
        return plan, new_states

    def _only_exact(self) -> str | None:
        """What torch's own functions can't do, where no kernels are compiled."""
        limit = self.max_grad_norm
        if isinstance(limit, AdaptiveClip):
            return f"max_grad_norm={limit}"
        return None if self._rings is None else f"telemetry={self._rings.size}"

    def _drop_state(self, params: list[Tensor]) -> None:
        if params:
            self._plan = None
        for param in params:
            self.state.pop(param, None)
            self._counters.pop(param, None)

    @staticmethod
    def _met_nonfinite(options: StepOptions, control: Tensor) -> bool:
        """Whether the step was skipped for its gradients, not because a scaler asked for it."""
        finite = math.isfinite(control[Control.SUM_OF_SQUARES].item())
        return not finite and not options.asks_for_skip()

    def _nonfinite_error(self) -> checks.NonFiniteGradientError:
        places = self._nonfinite_places()
        names = [name_of(self.param_groups, g, i) for g, i in places]
        grads = [self.param_groups[g]["params"][i].grad for g, i in places]
        if self._rings is not None:
            return checks.NonFiniteGradientError(names, explain.last_step(self.telemetry()))
        return checks.NonFiniteGradientError(names, explain.describe_grads(names, grads))

    def _nonfinite_places(self) -> list[tuple[int, int]]:
        """(group, index in the group) of the parameters whose gradients hold inf or nan."""
        if self._plan is not None:
            return self._plan.nonfinite()
        return [
            (g, i)
            for g, group in enumerate(self.param_groups)
            for i, param in enumerate(group["params"])
            if param.grad is not None and not norms.chunk_sums(param, param.grad).isfinite().all()
        ]


# Where torch.compile meets a step, it breaks the graph instead of looking for one inside.
_untraced_step = _disable_dynamo(FusedOptimizer._locked_step)
