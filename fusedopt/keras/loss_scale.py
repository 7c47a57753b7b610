"""Keras's loss scaling without passes of its own."""

from __future__ import annotations

from typing import Any

from fusedopt.keras.backend import keras
from fusedopt.keras.base import FusedKerasOptimizer

ops = keras.ops


@keras.saving.register_keras_serializable(package="fusedopt")
class LossScaleOptimizer(keras.optimizers.LossScaleOptimizer):
    """Keras's, which hands its scale to the step of a fused optimizer.

    Keras's own looks for inf and nan, and divides all gradients, in passes of their own. With
    gradient accumulation, or around an optimizer that is not fused, this one does so too.
    """

    def stateless_apply(
        self, optimizer_variables: Any, grads: Any, trainable_variables: Any
    ) -> Any:
        """As Keras's."""
        if not self._hands_over():
            return super().stateless_apply(optimizer_variables, grads, trainable_variables)
        inner: Any = self.inner_optimizer
        inner._backend.check_stateless()
        return keras.optimizers.Optimizer.stateless_apply(
            self, optimizer_variables, grads, trainable_variables
        )

    def _common_apply(self, grads: Any, trainable_variables: Any = None) -> None:
        inner: Any = self.inner_optimizer
        if not self._hands_over():
            super()._common_apply(grads, trainable_variables)
            return
        scale = self.dynamic_scale.value
        applied = inner._apply_scaled(grads, trainable_variables, scale)
        is_last = ops.equal(self.step_counter, self.dynamic_growth_steps - 1)
        grown = ops.where(is_last, scale * 2, scale)
        counted = ops.where(is_last, 0, self.step_counter + 1)
        self.dynamic_scale.assign(ops.where(applied, grown, scale * 0.5))
        self.step_counter.assign(ops.where(applied, counted, 0))

    def _hands_over(self) -> bool:
        """Whether one step of ours takes all of these gradients, and all of them are scaled."""
        inner: Any = self.inner_optimizer
        return (
            isinstance(inner, FusedKerasOptimizer)
            and not inner.gradient_accumulation_steps
            and inner._backend.updates_all()
        )
