"""Keras's optimizers with a fused step.

    model.compile(optimizer=fusedopt.keras.FusedAdamW(1e-3, global_clipnorm=1.0), loss=...)

Each class is derived from Keras's own, and has its arguments, its variables and its config.
"""

from __future__ import annotations

from typing import Any, ClassVar

from fusedopt.keras.backend import keras
from fusedopt.keras.base import FusedKerasOptimizer
from fusedopt.keras.loss_scale import LossScaleOptimizer

__all__ = [
    "FusedAdam",
    "FusedAdamW",
    "FusedNadam",
    "FusedRMSprop",
    "FusedSGD",
    "LossScaleOptimizer",
]

_registered = keras.saving.register_keras_serializable(package="fusedopt")


@_registered
class FusedAdam(FusedKerasOptimizer, keras.optimizers.Adam):
    """`keras.optimizers.Adam` with a fused step: the same arguments, and `nonfinite`.

    As in Keras, `epsilon` is added before the bias correction, and weights decay by themselves.
    """

    rule: ClassVar = "adam"

    def _options(self) -> dict[str, Any]:
        return {
            "betas": (self.beta_1, self.beta_2),
            "eps": self.epsilon,
            "amsgrad": self.amsgrad,
            "eps_hat": True,
            "decoupled_weight_decay": True,
        }

    def _states(self) -> dict[str, Any]:
        states: dict[str, Any] = {"exp_avg": self._momentums, "exp_avg_sq": self._velocities}
        return {**states, "max_exp_avg_sq": self._velocity_hats} if self.amsgrad else states


@_registered
class FusedAdamW(FusedAdam, keras.optimizers.AdamW):
    """`keras.optimizers.AdamW` with a fused step: the same arguments, and `nonfinite`."""


@_registered
class FusedNadam(FusedKerasOptimizer, keras.optimizers.Nadam):
    """`keras.optimizers.Nadam` with a fused step: the same arguments, and `nonfinite`."""

    rule: ClassVar = "nadam"

    def _options(self) -> dict[str, Any]:
        return {
            "betas": (self.beta_1, self.beta_2),
            "eps": self.epsilon,
            "momentum_decay": 1.0,
            "decoupled_weight_decay": True,
        }

    def _states(self) -> dict[str, Any]:
        return {"exp_avg": self._momentums, "exp_avg_sq": self._velocities}

    def _scalars(self) -> dict[str, Any]:
        return {**super()._scalars(), "mu_product": self._u_product}

    def _keep(self, scalars: dict[str, Any]) -> None:
        self._u_product.assign(scalars["mu_product"])


@_registered
class FusedRMSprop(FusedKerasOptimizer, keras.optimizers.RMSprop):
    """`keras.optimizers.RMSprop` with a fused step: the same arguments, and `nonfinite`.

    As in Keras, `epsilon` is added inside the root, and the learning rate is in the momentum. With
    `centered`, a variance that rounding makes negative counts as 0.
    """

    rule: ClassVar = "rmsprop"

    def _options(self) -> dict[str, Any]:
        return {
            "alpha": self.rho,
            "eps": self.epsilon,
            "momentum": self.momentum,
            "centered": self.centered,
            "eps_in_sqrt": True,
            "lr_in_momentum": True,
            "decoupled_weight_decay": True,
        }

    def _states(self) -> dict[str, Any]:
        states: dict[str, Any] = {"square_avg": self._velocities}
        if self.centered:
            states["grad_avg"] = self._average_gradients
        if self.momentum > 0:
            states["momentum_buffer"] = self._momentums
        return states


@_registered
class FusedSGD(FusedKerasOptimizer, keras.optimizers.SGD):
    """`keras.optimizers.SGD` with a fused step: the same arguments, and `nonfinite`.

    As in Keras, the momentum is what is added to the variable: the learning rate is in it.
    """

    rule: ClassVar = "sgd"

    def _options(self) -> dict[str, Any]:
        return {
            "momentum": self.momentum,
            "dampening": 0.0,
            "nesterov": bool(self.nesterov and self.momentum != 0),
            "lr_in_momentum": True,
            "decoupled_weight_decay": True,
        }

    def _states(self) -> dict[str, Any]:
        return {"momentum_buffer": self.momentums} if self.momentum != 0 else {}
