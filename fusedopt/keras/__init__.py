"""Keras's optimizers with a fused step, on Keras's torch backend.

    model.compile(optimizer=fusedopt.keras.FusedAdamW(1e-3, global_clipnorm=1.0), loss=...)

Each class is derived from Keras's own, and has its arguments, its variables and its config. The
step is that of torch's fused class, over the memory of Keras's variables.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch

from fusedopt.gradients.clip_grad import get_total_norm
from fusedopt.keras.base import FusedKerasOptimizer, keras
from fusedopt.keras.torch_step import TorchStep, foreach
from fusedopt.optimizers.adam import FusedAdam as TorchAdam
from fusedopt.optimizers.nadam import FusedNAdam as TorchNAdam
from fusedopt.optimizers.sgd import FusedSGD as TorchSGD

__all__ = ["FusedAdam", "FusedAdamW", "FusedNadam", "FusedSGD", "LossScaleOptimizer"]

_registered = keras.saving.register_keras_serializable(package="fusedopt")


@_registered
class FusedAdam(FusedKerasOptimizer, keras.optimizers.Adam):
    """`keras.optimizers.Adam` with a fused step: the same arguments, and `nonfinite`.

    As in Keras, `epsilon` is added before the bias correction, and weights decay by themselves.
    """

    torch_class = TorchAdam
    torch_options: ClassVar = {"decoupled_weight_decay": True}

    def _fixed_options(self) -> dict[str, Any]:
        return {"amsgrad": self.amsgrad}

    def _states(self) -> dict[str, Any]:
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

    def _states(self) -> dict[str, Any]:
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

    The rule is torch's, which has another order of weight decay, learning rate and sign. So
    momentum takes two more passes over its variables, `nesterov` and `weight_decay` one more pass
    over the gradients.
    """

    torch_class = TorchSGD

    def _decays_in_step(self) -> bool:
        return False

    def _states(self) -> dict[str, Any]:
        return {"momentum_buffer": self.momentums} if self.momentum != 0 else {}

    def _scalars(self) -> dict[str, float]:
        return {}

    def _options(self, lr: float) -> dict[str, Any]:
        """Keras's momentum m has the learning rate in it: m = momentum m - lr g, weight += m.

        That is torch's rule with the learning rate 1, dampening 1 - lr, and -m. For Nesterov's
        momentum the gradient itself has to be lr g: see `_before`.
        """
        if self.momentum == 0:
            return {"lr": lr, "momentum": 0.0}
        nesterov = bool(self.nesterov)
        dampening = 0.0 if nesterov else 1 - lr
        return {
            "lr": 1.0,
            "momentum": self.momentum,
            "dampening": dampening,
            "nesterov": nesterov,
        }

    def _before(self, step: TorchStep, lr: float, grads: Any, variables: Any) -> None:
        self._norm = None
        nesterov = bool(self.momentum != 0 and self.nesterov)
        if nesterov or self.weight_decay:
            self._measure(step, lr, grads, variables, nesterov)
        self._negate_momentum()

    def _after(self) -> None:
        self._negate_momentum()

    def _negate_momentum(self) -> None:
        if self.momentum != 0:
            momentums: list[Any] = [*self.momentums]
            used = [it.value.detach() for it in momentums if it is not None]
            foreach._foreach_neg_(used)

    def _measure(
        self, step: TorchStep, lr: float, grads: Any, variables: Any, nesterov: bool
    ) -> None:
        """Decays the weights if the step is going to be applied; clips for Nesterov's momentum."""
        optimizer = step.optimizer
        scale = 1.0 if optimizer.grad_scale is None else optimizer.grad_scale.double()
        mode, norm = optimizer._nonfinite_mode(), get_total_norm(grads).double() / scale
        if self.weight_decay and (mode == "propagate" or norm.isfinite()):
            decaying = [it.value for it in variables if self._use_weight_decay(it)]
            if decaying:
                foreach._foreach_mul_(decaying, 1 - lr * self.weight_decay)
        if nesterov:
            limit = self.global_clipnorm
            coef = 1.0 if limit is None else (limit / (norm + 1e-6)).clamp(max=1.0)
            optimizer.grad_scale = (torch.ones_like(norm) * scale / (lr * coef)).float()
            optimizer.max_grad_norm, optimizer.nonfinite = None, mode
            self._norm = norm.float()


@_registered
class LossScaleOptimizer(keras.optimizers.LossScaleOptimizer):
    """Keras's, which hands its scale to the step of a fused optimizer.

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
