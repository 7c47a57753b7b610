"""Keras's JAX backend: a step as a custom call, in place inside the program of Keras's loop."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp

from fusedopt.keras.backend import Backend, check_shape, keras
from fusedopt.keras.jax_step import Arrays, Formula, take_step

convert: Any = keras.ops.convert_to_tensor


class JaxBackend(Backend):
    """A step over the values of Keras's variables, which may be those of a stateless scope.

    The readings are variables: Keras's loop has the optimizer's variables as its state.
    """

    nonfinite_modes = ("skip", "propagate")
    is_stateless = True

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer)
        with keras.name_scope(optimizer.name, caller=optimizer):
            self.variables = [
                keras.Variable(0, name=name, dtype=dtype, trainable=False)
                for name, dtype in (
                    ("grad_norm", "float32"),
                    ("step_skipped", "bool"),
                    ("skipped_steps", "int32"),
                )
            ]
        self._program = jax.jit(self._run, static_argnums=(0, 1), inline=True)

    @property
    def grad_norm(self) -> jax.Array:
        return self.variables[0].value

    @property
    def step_skipped(self) -> jax.Array:
        return self.variables[1].value

    @property
    def skipped_steps(self) -> jax.Array:
        return self.variables[2].value

    def check_grad(self, grad: Any, variable: Any) -> None:
        if not isinstance(grad, jax.Array):
            raise TypeError(
                f"the gradient of {variable.path} is a {type(grad).__name__}; expected a dense "
                "JAX array"
            )
        check_shape(grad.shape, variable)

    def refresh(self) -> None:
        """Every step looks at the optimizer."""

    def apply(self, grads: Sequence[Any], variables: Sequence[Any], scale: Any) -> Any:
        changed = self._changed()
        places = tuple(self.optimizer._get_variable_index(it) for it in variables)
        applied, values = self._program(
            places,
            self._constants(variables),
            [it.value for it in changed],
            list(grads),
            scale,
            convert(self.optimizer.learning_rate, "float32"),
        )
        for variable, value in zip(changed, values, strict=True):
            variable.assign(value)
        return applied

    def _changed(self) -> list[Any]:
        """All variables that a step may change."""
        return [*self.optimizer._trainable_variables, *self.optimizer.variables]

    def _constants(self, variables: Sequence[Any]) -> str:
        """What a program has compiled in: it is compiled anew where something of it differs."""
        it = self.optimizer
        clipping = (it.clipnorm, it.clipvalue, it.global_clipnorm, it.nonfinite)
        averages = (it.use_ema, it.ema_momentum, it.ema_overwrite_frequency)
        decays = (it.weight_decay, [self.decays(variable) for variable in variables])
        constraints = [id(variable.constraint) for variable in variables]
        every = it.gradient_accumulation_steps
        scale = it.loss_scale_factor
        return repr((it._options(), clipping, scale, averages, decays, constraints, every))

    def _run(
        self, places: Sequence[int], constants: str, values: Any, grads: Any, scale: Any, lr: Any
    ) -> tuple[jax.Array, list[Any]]:
        """The program of `apply`: whether the step was applied, and the new values."""
        optimizer = self.optimizer
        variables = [optimizer._trainable_variables[place] for place in places]
        if optimizer.gradient_accumulation_steps:
            return self._with_values(values, lambda: self._accumulate(grads, variables, lr))
        factor = optimizer.loss_scale_factor
        if scale is None and factor is not None:
            scale = jnp.asarray(factor, jnp.float32)

        def step() -> jax.Array:
            applied = self._take_step(grads, variables, scale, scale is not None, lr)
            optimizer._iterations.assign_add(jnp.where(applied, 1, 0))
            return applied

        return self._with_values(values, step)

    def _with_values(
        self, values: Sequence[Any], body: Callable[[], jax.Array]
    ) -> tuple[jax.Array, list[Any]]:
        """What `body` returns if the variables have these values, and the values that it leaves."""
        changed = self._changed()
        with keras.StatelessScope(state_mapping=list(zip(changed, values, strict=True))) as scope:
            result = body()
        return result, [scope.get_current_value(it) for it in changed]

    def _accumulate(self, grads: Any, variables: Sequence[Any], lr: Any) -> jax.Array:
        """Adds gradients up, and takes a step with their average when it is time."""
        optimizer, changed = self.optimizer, self._changed()
        every, iterations = optimizer.gradient_accumulation_steps, optimizer._iterations
        all_sums = optimizer._accumulated_gradients
        kept = [all_sums[optimizer._get_variable_index(it)] for it in variables]
        for total, grad in zip(kept, grads):
            total.assign_add(grad * (1 / (optimizer.loss_scale_factor or 1)))

        def step() -> jax.Array:
            scale = jnp.asarray(every, jnp.float32)
            applied = self._take_step([it.value for it in kept], variables, scale, False, lr)
            for total in (it for it in all_sums if it is not None):
                total.assign(jnp.zeros_like(total.value))
            iterations.assign_add(jnp.where(applied, 1, 1 - every))
            return applied

        def go_on() -> jax.Array:
            self._average(jnp.asarray(True))
            iterations.assign_add(1)
            return jnp.asarray(True)

        applied, values = jax.lax.cond(
            (iterations.value + 1) % every == 0,
            lambda values: self._with_values(values, step),
            lambda values: self._with_values(values, go_on),
            [it.value for it in changed],
        )
        for variable, value in zip(changed, values, strict=True):
            variable.assign(value)
        return applied

    def _take_step(
        self, grads: Sequence[Any], variables: Sequence[Any], scale: Any, for_scaler: bool, lr: Any
    ) -> jax.Array:
        """One step, and what Keras does after it. Returns whether it was applied.

        Args:
            scale: the gradients are divided by it.
            for_scaler: whether the loss was scaled. Then an overflow skips: it is expected.
        """
        optimizer = self.optimizer
        places = [optimizer._get_variable_index(it) for it in variables]
        states = {name: [kept[it] for it in places] for name, kept in optimizer._states().items()}
        scalars = {name: it for name, it in optimizer._scalars().items() if name != "step"}
        norm, skipped, skips = self.variables
        before = Arrays(
            convert(optimizer.iterations, "int32"),
            skips.value,
            [convert(it, "float32") for it in scalars.values()],
            [it.value for it in variables],
            {name: [it.value for it in kept] for name, kept in states.items()},
        )
        grads = [grad.astype(it.dtype) for grad, it in zip(grads, variables)]
        formula = self._formula(variables, for_scaler)
        grads, scale = self.clipped(grads, scale, for_scaler)
        grad_norm, after = take_step(formula, lr, scale, grads, before)
        for variable, value in zip(variables, after.params):
            variable.assign(value)
        for name, kept in states.items():
            for variable, value in zip(kept, after.states[name]):
                variable.assign(value)
        optimizer._keep(dict(zip(scalars, after.scalars)))
        applied = after.skips == before.skips
        norm.assign(grad_norm)
        skipped.assign(~applied)
        skips.assign(after.skips)
        with self._only_if(applied, [it for it in variables if it.constraint is not None]) as some:
            for variable in some:
                variable.assign(variable.constraint(variable))
        self._average(applied)
        return applied

    def _formula(self, variables: Sequence[Any], for_scaler: bool) -> Formula:
        optimizer, skips = self.optimizer, self.skips(for_scaler)
        rows, groups = tuple(self.option_rows()), tuple(self.groups(variables))
        return Formula(optimizer.rule, rows, groups, optimizer.global_clipnorm, skips)

    def _average(self, applied: jax.Array) -> None:
        """Keras's moving average of the variables."""
        optimizer = self.optimizer
        if not optimizer.use_ema:
            return
        known, every = optimizer._trainable_variables, optimizer.ema_overwrite_frequency
        averages = [it for it in optimizer._model_variables_moving_average if it is not None]
        with self._only_if(applied, averages):
            optimizer._update_model_variables_moving_average(known)
        if every:
            is_time = (optimizer.iterations + 1) % every == 0
            with self._only_if(applied & is_time, known):
                optimizer._overwrite_model_variables_with_average_value(known)

    @contextmanager
    def _only_if(self, condition: jax.Array, variables: Sequence[Any]) -> Iterator[Sequence[Any]]:
        """What is assigned to these variables holds if the condition does."""
        before = [it.value for it in variables]
        yield variables
        for variable, value in zip(variables, before):
            variable.assign(jnp.where(condition, variable.value, value))
