"""Keras's TensorFlow backend: a step is one op over the variables, eager or in a `tf.function`."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext

from fusedopt.core import c_library, tensorflow_op
from fusedopt.core.nonfinite import NONFINITE_MODES, NonFiniteGradientError
from fusedopt.keras.backend import Backend, check_shape


class TensorflowBackend(Backend):
    """A step of TensorFlow's op. A `tf.function` keeps the settings that it was traced with."""

    nonfinite_modes = NONFINITE_MODES

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer)
        tensorflow_op.load()  # raises ImportError if it can't be used
        with tf.init_scope():
            self._grad_norm = tf.Variable(0.0, trainable=False)
            self._step_skipped = tf.Variable(False, trainable=False)
            self._skipped_steps = tf.Variable(0, trainable=False, dtype=tf.int64)

    @property
    def grad_norm(self) -> Any:
        return self._grad_norm.read_value()

    @property
    def step_skipped(self) -> Any:
        return self._step_skipped.read_value()

    @property
    def skipped_steps(self) -> Any:
        return self._skipped_steps.read_value()

    def check_grad(self, grad: Any, variable: Any) -> None:
        if not isinstance(grad, (tf.Tensor, tf.IndexedSlices)):
            raise TypeError(
                f"the gradient of {variable.path} is a {type(grad).__name__}; expected a "
                "tf.Tensor or tf.IndexedSlices"
            )
        if not grad.shape.is_compatible_with(variable.shape):
            check_shape(grad.shape, variable)

    def refresh(self) -> None:
        """Every call of `apply` looks at all variables."""

    @tf.autograph.experimental.do_not_convert
    def apply(self, grads: Sequence[Any], variables: Sequence[Any], scale: Any) -> Any:
        self._check_context()
        optimizer = self.optimizer
        dense = [tf.cast(tf.convert_to_tensor(it), v.dtype) for it, v in zip(grads, variables)]
        if optimizer.gradient_accumulation_steps:
            return self._accumulate(dense, variables)
        if scale is None and optimizer.loss_scale_factor is not None:
            scale = optimizer.loss_scale_factor
        applied = self._take_step(dense, variables, scale, scale is not None)
        self._count(applied, 1, 0)
        return applied

    def _check_context(self) -> None:
        name = type(self.optimizer).__name__
        if GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()):
            raise NotImplementedError(
                f"{name} does not work with jit_compile=True: XLA can't compile its step; expected "
                "model.compile(..., jit_compile=False), or model.jit_compile = False for a loaded "
                "model"
            )
        if tf.distribute.has_strategy():
            raise NotImplementedError(
                f"{name} does not work with {type(tf.distribute.get_strategy()).__name__}; "
                "expected no tf.distribute strategy"
            )

    def _count(self, applied: Any, if_applied: int, if_not: int) -> None:
        iterations = self.optimizer._iterations
        iterations.assign_add(tf.cast(tf.where(applied, if_applied, if_not), iterations.dtype))

    def _accumulate(self, grads: Sequence[Any], variables: Sequence[Any]) -> Any:
        """Adds gradients up, and takes a step with their average when it is time."""
        optimizer = self.optimizer
        every, all_sums = optimizer.gradient_accumulation_steps, optimizer._accumulated_gradients
        sums = [all_sums[optimizer._get_variable_index(it)].value for it in variables]
        scale = optimizer.loss_scale_factor or 1
        for kept, grad in zip(sums, grads):
            kept.assign_add(grad / tf.cast(scale, grad.dtype))

        def step() -> Any:
            applied = self._take_step(sums, variables, every, False)
            for kept in all_sums:
                if kept is not None:
                    kept.assign(tf.zeros_like(kept.value))
            self._count(applied, 1, 1 - every)
            return applied

        def wait() -> Any:
            self._average()
            self._count(True, 1, 0)
            return tf.constant(True)

        return tf.cond(tf.equal((optimizer._iterations.value + 1) % every, 0), step, wait)

    def _take_step(
        self, grads: Sequence[Any], variables: Sequence[Any], scale: Any, for_scaler: bool
    ) -> Any:
        """One step, and what Keras does after it. Returns whether it was applied.

        Args:
            scale: the gradients are divided by it.
            for_scaler: whether the loss was scaled. Then an overflow skips: it is expected.
        """
        optimizer, mode = self.optimizer, self.mode()
        grads, scale = self.clipped(grads, scale, for_scaler)
        done, scalars = self._call(grads, variables, scale, self.skips(for_scaler))
        self._grad_norm.assign(done.grad_norm)
        self._step_skipped.assign(done.skipped)
        self._skipped_steps.assign_add(tf.cast(done.skipped, tf.int64))
        applied = tf.logical_not(done.skipped)
        optimizer._keep(dict(zip(scalars, tf.unstack(done.new_scalars))))
        if mode == "raise" and not for_scaler:
            self._raise_if(done.skipped, grads, variables)
        if optimizer.use_ema or any(it.constraint is not None for it in variables):
            tf.cond(applied, lambda: self._after(variables), lambda: None)
        return applied

    def _call(
        self, grads: Sequence[Any], variables: Sequence[Any], scale: Any, skips: bool
    ) -> tuple[Any, list[str]]:
        """Calls the op. Returns its results, and the names of the rule's scalars."""
        optimizer = self.optimizer
        rule = c_library.load().rules[optimizer.rule]
        numbers = self._numbers()
        used = c_library.states_used(optimizer.rule, numbers.ctypes.data)
        kept, now = optimizer._states(), optimizer._scalars()
        places = [optimizer._get_variable_index(it) for it in variables]
        limit = optimizer.global_clipnorm
        lr = tf.cast(tf.convert_to_tensor(optimizer.learning_rate), tf.float64)
        done = tensorflow_op.load()(
            variables=[it.value.handle for it in variables],
            states=[kept[name][place].value.handle for name in used for place in places],
            grads=grads,
            lr=lr,
            options=numbers,
            scalars=tf.stack([_float32(now.get(name, now["step"])) for name in rule.scalars]),
            max_grad_norm=math.inf if limit is None else float(limit),
            grad_scale=[] if scale is None else tf.reshape(_float32(scale), [1]),
            rule=optimizer.rule,
            groups=self.groups(variables),
            states_used=[name in used for name in rule.states],
            measure=limit is not None or skips,
            skip_nonfinite=skips,
        )
        return done, [*rule.scalars]

    def _numbers(self) -> NDArray[np.float64]:
        """The options of variables that decay, and of others. The op replaces lr."""
        rows = [c_library.in_order(self.optimizer.rule, row) for row in self.option_rows()]
        return np.array(rows, np.float64)

    def _raise_if(self, skipped: Any, grads: Sequence[Any], variables: Sequence[Any]) -> None:
        """Raises NonFiniteGradientError. In a graph, TensorFlow wraps it."""
        names = [it.path for it in variables]

        def fail(*tensors: Any) -> None:
            raise _error(names, [it.numpy() for it in tensors])

        def check() -> None:
            tf.py_function(fail, [*grads], [])

        if not tf.executing_eagerly():
            tf.cond(skipped, check, lambda: None)
        elif skipped:
            fail(*map(tf.convert_to_tensor, grads))

    def _after(self, variables: Sequence[Any]) -> None:
        for variable in variables:
            if variable.constraint is not None:
                variable.assign(variable.constraint(variable))
        self._average()

    def _average(self) -> None:
        """Keras's moving average of the variables."""
        optimizer = self.optimizer
        if optimizer.use_ema:
            known, every = optimizer._trainable_variables, optimizer.ema_overwrite_frequency
            optimizer._update_model_variables_moving_average(known)
            if every:
                is_last = tf.equal((optimizer._iterations.value + 1) % every, 0)
                overwrite = optimizer._overwrite_model_variables_with_average_value
                tf.cond(is_last, lambda: overwrite(known), lambda: None)


def _float32(value: Any) -> Any:
    return tf.cast(tf.convert_to_tensor(value), tf.float32)


def _error(names: Sequence[str], grads: Sequence[Any]) -> NonFiniteGradientError:
    counts = [(int(np.isinf(it).sum()), int(np.isnan(it).sum())) for it in grads]
    bad = [(name, *count) for name, count in zip(names, counts) if any(count)]
    text = "; ".join(f"{name} has {infs} inf and {nans} nan" for name, infs, nans in bad)
    return NonFiniteGradientError([it[0] for it in bad], text or "their squares overflow")
