"""The base of every fused optimizer: torch's protocol around one fused step."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from typing import Any, Literal, TypeVar, overload

import torch
from torch._compile import _disable_dynamo

from fusedopt.core import backends, check_settings, checks, sharding
from fusedopt.core.callers import asks_for_state
from fusedopt.core.check_formats import check_formats
from fusedopt.core.names import ParamNames
from fusedopt.core.nonfinite import check_choice
from fusedopt.core.persistence import Persistence
from fusedopt.core.provisional_state import ProvisionalState
from fusedopt.core.stepper import Stepper
from fusedopt.reference import Group
from fusedopt.telemetry import Rings

Loss = TypeVar("Loss")
Backend = Literal["cuda", "cpu", "reference"]


class FusedOptimizer(Persistence, Stepper):
    """The base of all fused optimizers: what they have in addition to their torch twins.

    Every class has these keyword-only arguments:

    * `max_grad_norm` (float > 0, or None): clip the global L2 norm of all gradients of all groups:
      `coef = min(1, max_grad_norm / (norm + 1e-6))`, as `torch.nn.utils.clip_grad_norm_` does.
      inf measures and checks, but never clips. It may also be a limit of `fusedopt.clip`:
      `Percentile()` and `ZScore()` follow the norms of earlier steps, `PerTensor()` follows each
      parameter's norms, and `Unit()` compares rows of gradients with rows of weights.
    * `nonfinite`: the reaction to a gradient with inf or nan. "skip" leaves every parameter and
      state as it was. "raise" does so too, and raises `NonFiniteGradientError`, which names the
      parameters (it waits for the device). "propagate" updates regardless, as torch does. None
      means "skip" if `max_grad_norm` is set, else "propagate".
    * `backend`: "cuda", "cpu", "reference" (plain torch), or None, which goes by the parameters'
      device.
    * `telemetry` (int > 0, or None): the number of steps whose measurements are kept, for
      `telemetry()` and `explain()`. They take 48 bytes per step and parameter on the parameters'
      devices.
    * `max_consecutive_skips` (int > 0, or None): after so many skipped steps in a row, `step()`
      raises `TooManySkipsError`. It doesn't wait for a GPU, and may notice some steps later.
    * `process_group` (ProcessGroup, DeviceMesh, or None): the ranks that step together. They have
      the same norm to the bit, and skip together. With None, the parameters that are DTensors
      (FSDP2, tensor parallelism) tell the ranks: their mesh, or the common root of their meshes.
    * `plain`: the meaning of parameters that are no DTensors: "replicated" if all ranks hold the
      same ones, "own" if each rank has its own. A param group with `"counted": False` is clipped
      and updated, but its gradients are counted on another rank (tied embeddings of pipeline
      stages).

    * `check_replicas` (int > 0, or None): once in so many steps, the ranks that should hold the
      same gradients compare checksums of their bits: copies of DDP, replicated dimensions of a
      mesh. If some differ, nothing is changed, and all ranks raise `ReplicasDifferError` with the
      names of parameters and ranks. It reads the gradients once more, and waits for the device.
    * `master_weights`: "exact" keeps, for every 16-bit parameter, the bits that are missing to a
      float32 in `state["param_rest"]` (int16), and trains as float32 does. "24bit" keeps 8 bits
      (int8): the master is rounded to 24 bits. None: no master.
    * `state_dtype`: `torch.float32` or `torch.bfloat16` for the states; "8bit" for blocks of 64
      codes with a scale, in `state["exp_avg_8bit"]`, `state["exp_avg_scale"]` and so on; None: the
      parameter's dtype.
    * `rounding`: how 16-bit arrays are rounded. None: second moments at random if one of these
      options is set, all else to nearest; "nearest"; "stochastic": bfloat16 weights without a
      master at random, too.
    * `seed` (int, or None): of the random rounding.

    The last four may differ by param group. A group has those that were set. They are not taken
    from a checkpoint.

    All but `backend`, `telemetry`, `process_group`, `plain`, `check_replicas` and these four are
    attributes and may be changed between steps. `foreach`, `fused` and `capturable` are accepted
    where the twin has them, and change nothing: the step is always fused and capturable.

    The others hold for all param groups. In a group they are refused. But a group with
    `"clipped": False` is not clipped: its gradients don't count in the norm that clips (`grad_norm`
    is that of the other groups), and its update takes them as they are. inf or nan in them skips
    the step of all groups, as anywhere. It may be changed between steps, and is not taken from a
    checkpoint.

    Parameters are float32, float64, bfloat16 or float16, of any shape and strides, on CPU and CUDA,
    in any mix. 16-bit parameters are computed in float32 and rounded once. Frozen parameters may be
    of any kind: a parameter without a gradient is left alone. A parameter that is listed twice is
    updated once; torch's for-loops update it twice. `step` and `mu_product` are float32 even if
    torch's default dtype is float64: the kernels and every checkpoint have one type for them.

    If each rank's optimizer sees only a part of the model (FSDP's flat parameters,
    `ZeroRedundancyOptimizer`), `max_grad_norm`, `nonfinite` and `fusedopt.GradScaler` are refused,
    as the norm would be that of the part. Updates alone are right.

    Raises:
        TypeError, ValueError, RuntimeError: an argument, a parameter, a gradient or a state is
            refused; the message names it. Nothing has been changed.
    """

    def __init__(self, params: Any, *args: Any, **kwargs: Any) -> None:
        of_torch = super().__init__
        try:
            of_torch(params, *args, **kwargs)
        except TypeError as error:  # torch's words don't name the option
            checks.check_arguments(self.rule, _given(of_torch, params, *args, **kwargs), error)
            raise
        # torch 2.14 takes the first two of three betas.
        checks.check_lists(self.rule, _given(of_torch, params, *args, **kwargs))

    def _configure(
        self,
        max_grad_norm: Any,
        nonfinite: Any,
        backend: Any,
        telemetry: Any,
        max_consecutive_skips: Any,
        process_group: Any,
        plain: Any,
        check_replicas: Any,
        **formats: Any,
    ) -> None:
        """Sets our own arguments. Call it before torch's __init__, which adds the param groups."""
        self._own = {
            "plan": None,
            "provisional_state": ProvisionalState(),
            "control": None,
            "clip_state": None,
            "clip_params": None,
            "loaded_steps": 0,
            "grad_scale": None,
            "found_inf": None,
            "skips_for_scaler": False,
            "group_keys": [],
            "sharded": None,
            "formats": {key: value for key, value in formats.items() if value is not None},
            "seen_formats": [],
            "process_group": process_group,
            "plain": check_settings.check_plain(plain),
            "check_replicas": check_settings.check_count("check_replicas", check_replicas),
            "steps_until_check": check_replicas,
            "ranks": None,
            "share": None,
            "last_message": None,
            "counted": None,
            "all_replicated": False,
            "is_sharded": False,
            "part": None,
            "was_part": False,
            "together": None,
            "view": backends.new_view(),
            "scratch": {},
            "second_half": None,
        }
        check_formats("", self._own["formats"])
        if not self._knows_ranks():
            self._own["sharded"] = sharding.sharding_caller()
        self._names = ParamNames()
        self._lock = threading.RLock()
        self.max_grad_norm = max_grad_norm
        self.nonfinite = nonfinite
        self.max_consecutive_skips = max_consecutive_skips
        kept_steps = check_settings.check_telemetry(telemetry)
        self._rings = None if kept_steps is None else Rings(kept_steps)
        self._backend = check_choice("backend", backend, check_settings.BACKENDS)
        backends.choose(self._backend, [])

    def __repr__(self) -> str:
        kept_steps = None if self._rings is None else self._rings.size
        ours = {
            "max_grad_norm": self.max_grad_norm,
            "nonfinite": self.nonfinite,
            "backend": self._backend,
            "telemetry": kept_steps,
            "max_consecutive_skips": self.max_consecutive_skips,
        }
        lines = "".join(f"{name}: {value}\n" for name, value in ours.items())
        return f"{super().__repr__()[:-1]}{lines})"

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """False: stock scalers unscale before the step, and no trainer refuses to clip.

        True over several ranks: a stock scaler that finds inf on this rank alone would not call
        `step`, and the others would wait for it.
        """
        try:
            return self._find_ranks("torch.amp.GradScaler") is not None
        except ValueError:
            return True  # step() says what is wrong, to all ranks

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        """Ignored: torch's __init__ sets it for `fused=True`."""

    def add_param_group(self, param_group: Group) -> None:
        sharded = self._own["sharded"]
        self._plan = None
        checks.normalize_options(self.rule, self.defaults)
        if isinstance(param_group, dict):
            for key, value in self._own["formats"].items():
                param_group.setdefault(key, value)
        super().add_param_group(param_group)
        self._follow_names()
        try:
            index = len(self.param_groups) - 1
            group = self.param_groups[index]
            self._check_group(index)
            own = {key: it for key, it in self.defaults.items() if group[key] is not it}
            # The constructor has looked at the defaults.
            checks.check_ranges(f"param group {index}: ", self.rule, group, own)
            checks.normalize_options(self.rule, group)
        except Exception:
            self.param_groups.pop()
            self._own["sharded"] = sharded
            raise

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], Loss]) -> Loss: ...

    def step(self, closure: Callable[[], Loss] | None = None) -> Loss | None:
        """Checks, unscales, measures, clips and updates all parameters, or skips the step.

        It waits for no device, with three exceptions: `nonfinite="raise"`, a norm over parameters
        on both CPU and CUDA, and hyperparameters other than `lr` that are tensors on CUDA. Over
        several ranks docs/distributed.md names a few more.

        Args:
            closure: reevaluates the model and returns the loss, a number or a tensor.

        Returns:
            What `closure` returned, if one was given.

        Raises:
            NonFiniteGradientError: gradients held inf or nan, with `nonfinite="raise"`.
            TooManySkipsError: `max_consecutive_skips` steps in a row were skipped.
            TypeError, ValueError, RuntimeError: a parameter, a gradient, a state or an option is
                refused, or a step that is captured in a CUDA graph would have to make state; the
                message names it. Nothing has been changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            _untraced_step(self)
        elif not self._own["state"] and asks_for_state():
            self.init_state()
        else:
            self._locked_step()
        return loss

    def _locked_step(self) -> None:
        """A large step lets other threads run. The lock keeps them out of this optimizer."""
        with self._lock:
            self._fused_step()


# torch.compile breaks its graph at a step. It doesn't compile the code inside.
_untraced_step = _disable_dynamo(FusedOptimizer._locked_step)


def check_optimizer(function: str, optimizer: object) -> None:
    """Refuses another library's optimizer as the argument of a function."""
    if not isinstance(optimizer, FusedOptimizer):
        raise TypeError(
            f"{function} was given a {type(optimizer).__name__}; expected one of fusedopt's "
            "optimizers"
        )


def _given(of_torch: Callable[..., None], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The options of a call of torch's constructor, by their names."""
    given = inspect.signature(of_torch).bind(*args, **kwargs).arguments
    return {name: it for name, it in given.items() if name != "params"}
