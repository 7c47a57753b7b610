"""The base of all classes here: Keras's protocol around the step of torch's fused class."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fusedopt.core.nonfinite import NONFINITE_MODES, NonFinite, check_choice, check_limit
from fusedopt.core.optimizer import FusedOptimizer
from fusedopt.keras.torch_step import TorchStep, foreach


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


def _check_settings(optimizer: Any) -> None:
    for name in ("clipnorm", "clipvalue"):
        if getattr(optimizer, name) is not None:
            raise ValueError(
                f"{name}={getattr(optimizer, name)} is not supported by {type(optimizer).__name__};"
                " expected None. global_clipnorm clips all gradients by one factor"
            )
    check_limit("global_clipnorm", optimizer.global_clipnorm)
    check_choice("nonfinite", optimizer.nonfinite, NONFINITE_MODES)


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
        _check_settings(self)

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
        _check_settings(self)
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
        foreach._foreach_add_(sums, list(grads), alpha=1 / (self.loss_scale_factor or 1))
        if (int(self._iterations) + 1) % every != 0:
            self._average()
            return True
        applied = False
        try:
            scale = torch.tensor(float(every), device=sums[0].device)
            applied = self._step(sums, variables, scale, False)
        finally:
            used = [it.value.detach() for it in self._accumulated_gradients if it is not None]
            foreach._foreach_zero_(used)
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
            try:
                optimizer.step()
            finally:
                self._after()
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
        options = {**self.torch_options, **self._fixed_options()}
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

    def _fixed_options(self) -> dict[str, Any]:
        """The options that hold for all steps, as Keras's constructor got them."""
        return {}

    def _states(self) -> dict[str, Any]:
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

    def _after(self) -> None:
        """What a class undoes after the step, whether it was skipped or raised."""

    def _keep(self, left: dict[str, float]) -> None:
        """Takes over the rule's scalars after a step that was applied."""
