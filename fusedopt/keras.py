"""Keras's optimizers with a fused step, on Keras's torch backend.

    model.compile(optimizer=fusedopt.keras.FusedAdamW(1e-3, global_clipnorm=1.0), loss=...)

Each class is derived from Keras's own, and has its arguments, its variables and its config. The
step is that of torch's fused class, over the memory of Keras's variables.
"""

from __future__ import annotations

import inspect
import math
import numbers
import os
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fusedopt.core import check_settings
from fusedopt.core.optimizer import FusedOptimizer
from fusedopt.core.other_variables import TorchStep
from fusedopt.core.settings import NonFinite
from fusedopt.gradients.clip_grad import get_total_norm
from fusedopt.optimizers.adam import FusedAdam as TorchAdam
from fusedopt.optimizers.nadam import FusedNAdam as TorchNAdam
from fusedopt.optimizers.sgd import FusedSGD as TorchSGD


def _refusal(backend: str) -> ImportError:
    return ImportError(
        f"KERAS_BACKEND is {backend}; fusedopt.keras works on torch so far: set the environment "
        "variable to 'torch' before keras is imported"
    )


try:
    import keras
except ImportError as error:
    chosen = os.environ.get("KERAS_BACKEND", "torch")
    if chosen != "torch":
        raise _refusal(chosen) from error
    raise
if keras.config.backend() != "torch":
    raise _refusal(keras.config.backend())

__all__ = ["FusedAdam", "FusedAdamW", "FusedNadam", "FusedSGD", "LossScaleOptimizer"]

_registered = keras.saving.register_keras_serializable(package="fusedopt")
_foreach: Any = torch  # torch's functions over lists have private names


class FusedKerasOptimizer(keras.optimizers.Optimizer):
    """What the fused classes have in addition to Keras's.

    * `global_clipnorm` is torch's `max_grad_norm`: the norm is measured without overflow, and
      clipping costs no pass of its own.
    * `nonfinite` (keyword only): "skip" leaves all variables as they were if a gradient holds inf
      or nan, "raise" raises `NonFiniteGradientError` as well, "propagate" updates as Keras does.
      None is "skip" with `global_clipnorm`, else "propagate".
    * `grad_norm`, `step_skipped`, `skipped_steps`: 0-d tensors.

    `iterations` counts the steps that were applied. `clipnorm` and `clipvalue` are refused.

    Raises:
        ValueError, TypeError: an argument is refused; the message names it.
    """

    torch_class: ClassVar[type[FusedOptimizer]]
    torch_options: ClassVar[dict[str, Any]] = {}

    def __init_subclass__(cls) -> None:
        """Shows Keras's arguments, and ours."""
        super().__init_subclass__()
        own = inspect.signature(FusedKerasOptimizer.__init__).parameters["nonfinite"]
        of_keras = inspect.signature(cls.__bases__[-1].__init__).parameters.values()
        *names, rest = [it for it in of_keras if it.name != "self"]
        cls.__signature__ = inspect.Signature([*names, own, rest])

    def __init__(self, *args: Any, nonfinite: NonFinite | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.nonfinite = nonfinite
        self._torch_step: TorchStep | None = None
        self._norm: Tensor | None = None
        self._check_settings()

    def _check_settings(self) -> None:
        for name in ("clipnorm", "clipvalue"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name}={getattr(self, name)} is not supported by {type(self).__name__}; "
                    "expected None. global_clipnorm clips all gradients by one factor"
                )
        limit = self.global_clipnorm
        if limit is not None and not (isinstance(limit, numbers.Real) and limit > 0):
            raise ValueError(
                f"Invalid global_clipnorm value: {limit}; expected a float > 0 or None"
            )
        check_settings.check_choice("nonfinite", self.nonfinite, check_settings.NONFINITE_MODES)

    @property
    def grad_norm(self) -> Tensor:
        """The global gradient norm of the last step, before clipping: 0-d float32."""
        return self._reading("grad_norm", torch.float32) if self._norm is None else self._norm

    @property
    def step_skipped(self) -> Tensor:
        """Whether the last step met inf or nan and changed nothing: 0-d bool."""
        return self._reading("step_skipped", torch.bool)

    @property
    def skipped_steps(self) -> Tensor:
        """How many steps this object has skipped. It is not saved: 0-d int64."""
        return self._reading("skipped_steps", torch.int64)

    def _reading(self, name: str, dtype: torch.dtype) -> Tensor:
        if self._torch_step is None:
            return torch.zeros((), dtype=dtype)
        return getattr(self._torch_step.optimizer, name)

    def get_config(self) -> dict[str, Any]:
        """Keras's config. `nonfinite` is in it if it is not None."""
        config = super().get_config()
        return config if self.nonfinite is None else {**config, "nonfinite": self.nonfinite}

    def exclude_from_weight_decay(self, var_list: Any = None, var_names: Any = None) -> None:
        """As Keras's: these variables, or those whose names hold one of the strings."""
        super().exclude_from_weight_decay(var_list, var_names)
        self._torch_step = None

    def stateless_apply(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: the step is in place."""
        raise NotImplementedError(
            f"{type(self).__name__}.stateless_apply() is not supported: the step changes variables "
            "in place; expected apply()"
        )

    @torch.no_grad()
    def apply(self, grads: Sequence[Any], trainable_variables: Any = None) -> None:
        """Takes one step, or skips it. Arguments are as Keras's.

        Args:
            grads: a gradient, or None, for each variable.
            trainable_variables: the variables. None: those that the optimizer was built with.

        Raises:
            NonFiniteGradientError: gradients held inf or nan, with `nonfinite="raise"`.
            TypeError, ValueError, RuntimeError: a gradient, a variable or a setting is refused.
        """
        self._apply_scaled(grads, trainable_variables, None)

    def _apply_scaled(self, grads: Any, variables: Any, dynamic_scale: Tensor | None) -> bool:
        """As `apply`, for gradients of a scaled loss. Returns whether the step was applied."""
        if len(grads) == 0:
            return True
        self._check_settings()
        grads, variables = self._pairs(grads, variables)
        applied = True
        if grads:
            if self.gradient_accumulation_steps:
                applied = self._accumulate(grads, variables)
            else:
                factor = self.loss_scale_factor
                if dynamic_scale is None and factor is not None:
                    dynamic_scale = torch.tensor(float(factor), device=grads[0].device)
                applied = self._step(grads, variables, dynamic_scale, dynamic_scale is not None)
        if applied:
            self._iterations.assign_add(1)
        return applied

    def _pairs(self, grads: Any, variables: Any) -> tuple[list[Tensor], list[Any]]:
        """The gradients that there are, and their variables."""
        grads, step = list(grads), self._torch_step
        missing = any(grad is None for grad in grads)
        if missing or step is None or variables is None or not step.is_all(variables):
            variables = self._built_for(grads, variables)
            grads, variables = self._filter_empty_gradients(grads, variables)
            grads, variables = self._overwrite_variables_directly_with_gradients(grads, variables)
        for grad, variable in zip(grads, variables):
            if not isinstance(grad, Tensor):
                raise TypeError(
                    f"the gradient of {variable.path} is a {type(grad).__name__}; expected a dense "
                    "torch tensor"
                )
        return grads, variables

    def _built_for(self, grads: Any, variables: Any) -> list[Any]:
        """The variables of these gradients. The first call builds the optimizer."""
        if variables is None:
            if not self.built:
                raise ValueError(
                    "apply(grads) without variables needs an optimizer that is built; expected "
                    "optimizer.build(trainable_variables) before"
                )
            if len(grads) != len(self._trainable_variables):
                raise ValueError(
                    f"grads has {len(grads)} gradients; expected {len(self._trainable_variables)}, "
                    "one for each variable that the optimizer was built with"
                )
            return list(self._trainable_variables)
        variables = list(variables)
        if not self.built:
            with keras.name_scope(self.name, caller=self):
                self.build(variables)
        self._check_variables_are_known(variables)
        return variables

    def _accumulate(self, grads: Sequence[Tensor], variables: Sequence[Any]) -> bool:
        """Adds gradients up, and takes a step with their average when it is time."""
        every = self.gradient_accumulation_steps
        kept = [self._accumulated_gradients[self._get_variable_index(it)] for it in variables]
        sums = [it.value.detach() for it in kept]
        _foreach._foreach_add_(sums, list(grads), alpha=1 / (self.loss_scale_factor or 1))
        if (int(self._iterations) + 1) % every != 0:
            self._average()
            return True
        applied = False
        try:
            scale = torch.tensor(float(every), device=sums[0].device)
            applied = self._step(sums, variables, scale, False)
        finally:
            used = [it.value.detach() for it in self._accumulated_gradients if it is not None]
            _foreach._foreach_zero_(used)
            if not applied:
                self._iterations.assign_sub(every - 1)
        return applied

    def _step(self, grads: Any, variables: Any, scale: Tensor | None, for_scaler: bool) -> bool:
        """One step by torch's class, and what Keras does after it. Returns whether it was applied.

        Args:
            scale: the gradients are divided by it.
            for_scaler: whether the loss was scaled. Then an overflow skips: it is expected.
        """
        step = self._torch_step or self._new_torch_step()
        optimizer, lr = step.optimizer, float(self.learning_rate)
        optimizer.max_grad_norm, optimizer.nonfinite = self.global_clipnorm, self.nonfinite
        optimizer.grad_scale, optimizer.skips_for_scaler = scale, for_scaler
        for group in optimizer.param_groups:
            decay = self.weight_decay if group["decays"] else None
            group.update(self._options(lr), weight_decay=decay or 0.0)
        step.set_scalars(self._scalars())
        with step.gradients(grads, variables) as partial:
            self._before(step, lr, grads, variables)
            optimizer.step()
            applied = not optimizer.step_skipped
            left = step.keep_scalars(partial)
        if applied:
            self._keep(left)
            for variable in step.constrained:
                if any(variable is it for it in variables):
                    variable.assign(variable.constraint(variable))
            self._average()
        return applied

    def _new_torch_step(self) -> TorchStep:
        known = self._trainable_variables
        variables = [it for it in known if not self._overwrite_variable_with_gradient(it)]
        states = {
            name: [it for it in values if it is not None] for name, values in self._states().items()
        }
        decays = [self._decays_in_step() and self._use_weight_decay(it) for it in variables]
        options = self.torch_options
        self._torch_step = TorchStep(self.torch_class, variables, decays, states, **options)
        return self._torch_step

    def _average(self) -> None:
        """Keras's moving average of the variables."""
        if self.use_ema:
            self._update_model_variables_moving_average(self._trainable_variables)
            every = self.ema_overwrite_frequency
            if every and (int(self.iterations) + 1) % every == 0:
                self._overwrite_model_variables_with_average_value(self._trainable_variables)

    def _decays_in_step(self) -> bool:
        return True

    def _states(self) -> dict[str, list[Any]]:
        """The optimizer's variables, by the names of the rule's states."""
        raise NotImplementedError

    def _scalars(self) -> dict[str, float]:
        """The rule's scalars before this step."""
        return {"step": int(self.iterations)}

    def _options(self, lr: float) -> dict[str, Any]:
        """The options of this step for torch's class."""
        raise NotImplementedError

    def _before(self, step: TorchStep, lr: float, grads: Any, variables: Any) -> None:
        """What a class does before the step, which may be skipped."""

    def _keep(self, left: dict[str, float]) -> None:
        """Takes over the rule's scalars after a step that was applied."""


@_registered
class FusedAdam(FusedKerasOptimizer, keras.optimizers.Adam):
    """`keras.optimizers.Adam` with a fused step: the same arguments, and `nonfinite`.

    As in Keras, `epsilon` is added before the bias correction, and weights decay by themselves.
    """

    torch_class = TorchAdam
    torch_options: ClassVar = {"decoupled_weight_decay": True}

    def _new_torch_step(self) -> TorchStep:
        self.torch_options = {**type(self).torch_options, "amsgrad": self.amsgrad}
        return super()._new_torch_step()

    def _states(self) -> dict[str, list[Any]]:
        states = {"exp_avg": self._momentums, "exp_avg_sq": self._velocities}
        return {**states, "max_exp_avg_sq": self._velocity_hats} if self.amsgrad else states

    def _options(self, lr: float) -> dict[str, Any]:
        correction = 1 - self.beta_2 ** (int(self.iterations) + 1)
        eps = self.epsilon / math.sqrt(correction)
        return {"lr": lr, "betas": (self.beta_1, self.beta_2), "eps": eps}


@_registered
class FusedAdamW(FusedAdam, keras.optimizers.AdamW):
    """`keras.optimizers.AdamW` with a fused step: the same arguments, and `nonfinite`."""


@_registered
class FusedNadam(FusedKerasOptimizer, keras.optimizers.Nadam):
    """`keras.optimizers.Nadam` with a fused step: the same arguments, and `nonfinite`."""

    torch_class = TorchNAdam
    torch_options: ClassVar = {"decoupled_weight_decay": True, "momentum_decay": 1.0}

    def _states(self) -> dict[str, list[Any]]:
        return {"exp_avg": self._momentums, "exp_avg_sq": self._velocities}

    def _scalars(self) -> dict[str, float]:
        return {"step": int(self.iterations), "mu_product": float(self._u_product)}

    def _options(self, lr: float) -> dict[str, Any]:
        return {"lr": lr, "betas": (self.beta_1, self.beta_2), "eps": self.epsilon}

    def _keep(self, left: dict[str, float]) -> None:
        self._u_product.assign(left["mu_product"])


@_registered
class FusedSGD(FusedKerasOptimizer, keras.optimizers.SGD):
    """`keras.optimizers.SGD` with a fused step: the same arguments, and `nonfinite`.

    `weight_decay` and `nesterov` take one more pass over the gradients: the rule is torch's, which
    has another order of weight decay and of the learning rate.
    """

    torch_class = TorchSGD

    def _decays_in_step(self) -> bool:
        return False

    def _states(self) -> dict[str, list[Any]]:
        return {"momentum_buffer": self.momentums} if self.momentum != 0 else {}

    def _scalars(self) -> dict[str, float]:
        return {}

    def _options(self, lr: float) -> dict[str, Any]:
        """Keras's momentum has the learning rate in it: m = momentum m - lr g, weight += m.

        That is torch's rule with the learning rate -1 and dampening 1 + lr. For Nesterov's momentum
        the gradient itself has to be lr g: see `_before`.
        """
        if self.momentum == 0:
            return {"lr": lr, "momentum": 0.0}
        nesterov = bool(self.nesterov)
        dampening = 0.0 if nesterov else 1 + lr
        own = {"dampening": dampening, "nesterov": nesterov, "maximize": nesterov}
        return {"lr": -1.0, "momentum": self.momentum, **own}

    def _before(self, step: TorchStep, lr: float, grads: Any, variables: Any) -> None:
        nesterov = bool(self.momentum != 0 and self.nesterov)
        self._norm = None
        if not nesterov and not self.weight_decay:
            return
        optimizer = step.optimizer
        scale = 1.0 if optimizer.grad_scale is None else optimizer.grad_scale.double()
        mode, norm = optimizer._nonfinite_mode(), get_total_norm(grads).double() / scale
        if self.weight_decay and (mode == "propagate" or norm.isfinite()):
            decaying = [it.value for it in variables if self._use_weight_decay(it)]
            if decaying:
                _foreach._foreach_mul_(decaying, 1 - lr * self.weight_decay)
        if nesterov:
            limit = self.global_clipnorm
            coef = 1.0 if limit is None else (limit / (norm + 1e-6)).clamp(max=1.0)
            optimizer.grad_scale = (torch.ones_like(norm) * scale / (lr * coef)).float()
            optimizer.max_grad_norm, optimizer.nonfinite = None, mode
            self._norm = norm.float()


@_registered
class LossScaleOptimizer(keras.optimizers.LossScaleOptimizer):
    """`keras.optimizers.LossScaleOptimizer`, which hands its scale to the step of a fused optimizer.

    Keras's own looks for inf and nan, and divides all gradients, in passes of their own. With
    gradient accumulation, or around an optimizer that is not fused, this one does so too.
    """

    def _common_apply(self, grads: Any, trainable_variables: Any = None) -> None:
        inner: Any = self.inner_optimizer
        if not isinstance(inner, FusedKerasOptimizer) or not self._scales_all(inner):
            super()._common_apply(grads, trainable_variables)
        elif not inner._apply_scaled(grads, trainable_variables, self.dynamic_scale.value.detach()):
            self._stateful_handle_non_finite_grads()
        elif int(self.step_counter) == self.dynamic_growth_steps - 1:
            self.step_counter.assign(0)
            self.dynamic_scale.assign(self.dynamic_scale * 2.0)
        else:
            self.step_counter.assign_add(1)

    def _scales_all(self, inner: FusedKerasOptimizer) -> bool:
        """Whether one step takes all of these gradients, and all of them are scaled."""
        known = self._trainable_variables
        overwritten = any(self._overwrite_variable_with_gradient(it) for it in known)
        return not inner.gradient_accumulation_steps and not overwritten
