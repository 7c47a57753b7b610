"""Results of the last steps: the norm, skips, telemetry."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from fusedopt.core.plan import Plan
from fusedopt.core.provisional_state import ProvisionalState
from fusedopt.core.settings import Settings
from fusedopt.distributed import Share
from fusedopt.reference import Control, Rule
from fusedopt.reference.limits import AdaptiveClip
from fusedopt.telemetry import PendingTelemetry, Rings, Telemetry, explain


class Readings(Settings):
    """Copies of a step's results on the device. Using the value of one waits for the device."""

    rule: ClassVar[Rule]
    _rings: Rings | None
    _backend: str | None

    @property
    def _plan(self) -> Plan | None:
        """The plan of the next step. None: the next step checks everything and makes a plan."""
        return self._own["plan"]

    @_plan.setter
    def _plan(self, plan: Plan | None) -> None:
        self._own["plan"] = plan

    @property
    def _provisional_state(self) -> ProvisionalState:
        return self._own["provisional_state"]

    def _settings(self) -> dict[str, Any]:
        """Our arguments, as they are set now."""
        own, rings = self._own, self._rings
        return {
            "max_grad_norm": own["max_grad_norm"],
            "nonfinite": own["nonfinite"],
            "backend": self._backend,
            "telemetry": None if rings is None else rings.size,
            "max_consecutive_skips": self.max_consecutive_skips,
            "process_group": own["process_group"],
            "plain": own["plain"],
            "check_replicas": own["check_replicas"],
        }

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

    def _reading(self, index: int, dtype: torch.dtype) -> Tensor:
        return self._readings()[index].to(dtype, copy=True)

    def _readings(self) -> Tensor:
        """The results of the last step on the first parameter's device; see `Control`."""
        own = self._own
        params = (p for group in own["param_groups"] for p in group["params"])
        devices = (p.device for p in params if not p.is_meta)
        device = next(devices, torch.device("cpu"))
        control = own["control"]
        if control is None or control.device != device:
            with torch.inference_mode(False):  # a tensor of inference mode could take no later step
                if control is None:
                    control = torch.zeros(Control.SIZE, dtype=torch.float64, device=device)
                own["control"] = control = control.to(device)
        return control

    def _keeps(self, param: Tensor) -> bool:
        """Whether this rank has the parameter's state and updates it; see `shard_states`."""
        share: Share | None = self._own["share"]
        return share is None or share.keeps(param)

    def _steps_taken(self) -> int:
        """How many steps were taken, including those before a loaded checkpoint."""
        return int(self._readings()[Control.STEPS])

    def _loaded_steps(self) -> int:
        """The number of steps before the last loaded checkpoint; 0 if none was loaded."""
        return self._own.get("loaded_steps", 0)

    @overload
    def telemetry(self, non_blocking: Literal[False] = False) -> Telemetry: ...

    @overload
    def telemetry(self, non_blocking: Literal[True]) -> PendingTelemetry: ...

    @_disable_dynamo
    @torch.inference_mode(False)
    def telemetry(self, non_blocking: bool = False) -> Telemetry | PendingTelemetry:
        """A copy of the measurements of the last steps, for optimizers made with `telemetry=N`.

        Args:
            non_blocking: only start the copy. `result()` of the returned object waits for it.

        Raises:
            RuntimeError: the optimizer was made without `telemetry`.
        """
        if self._rings is None:
            raise RuntimeError(
                f"this {type(self).__name__} keeps no telemetry; it is made with telemetry=N, the "
                "number of steps to keep"
            )
        with self._lock:
            self._follow_names()
            if self._plan is None:
                self._rings.resize(self.param_groups)
            pending = PendingTelemetry(
                self._rings, self._readings(), self.param_groups, self._loaded_steps()
            )
        return pending if non_blocking else pending.result()

    def explain(self) -> str:
        """Says whether the last step was clipped or skipped, and why. Waits for the device.

        With `telemetry=N` it names the parameters: "step 1042 skipped: layers.7.wq.weight, 3 inf of
        4.2M; its norm had grown 40-fold over the last 20 steps".
        """
        loaded = self._loaded_steps()
        if loaded > 0 and self._steps_taken() == loaded:
            return explain.NO_STEP_SINCE.format(loaded)
        limit = self.max_grad_norm
        part = limit.part if isinstance(limit, AdaptiveClip) else None
        if self._rings is not None:
            return explain.explain(self.telemetry(), part)
        return explain.explain_without_telemetry(self._readings(), part)
