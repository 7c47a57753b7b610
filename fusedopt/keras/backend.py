"""What a step needs from Keras's backend, and the choice of the file that provides it."""

from __future__ import annotations

import importlib
import operator
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from fusedopt.core.nonfinite import NonFinite, mode_of

# The class in fusedopt/keras/<name>_backend.py.
BACKENDS = {"jax": "JaxBackend", "tensorflow": "TensorflowBackend", "torch": "TorchBackend"}


def _refusal(backend: str) -> ImportError:
    return ImportError(
        f"KERAS_BACKEND is {backend}; fusedopt.keras works on {', '.join(BACKENDS)}: set the "
        "environment variable to one of them before keras is imported"
    )


try:
    import keras
except ImportError as error:
    chosen = os.environ.get("KERAS_BACKEND", "torch")
    if chosen not in BACKENDS:
        raise _refusal(chosen) from error
    raise


class Backend(ABC):
    """The step of one optimizer on one of Keras's backends. Its constructor makes one.

    Attributes:
        nonfinite_modes: the modes of `nonfinite` that this backend has.
        is_stateless: whether variables may be those of Keras's stateless scope.
        variables: Keras variables that a step changes, besides the optimizer's own. Keras's loop
            carries them, and nothing saves them.
    """

    nonfinite_modes: ClassVar[tuple[str, ...]]
    is_stateless: ClassVar[bool] = False

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.variables: list[Any] = []
        self._updated: list[Any] = []

    def updated(self) -> list[Any]:
        """The variables that the optimizer was built with, but for those that Keras overwrites."""
        if not self._updated:
            is_overwritten = self.optimizer._overwrite_variable_with_gradient
            known = self.optimizer._trainable_variables
            self._updated = [it for it in known if not is_overwritten(it)]
        return self._updated

    def updates_all(self) -> bool:
        """Whether Keras overwrites none of the variables."""
        return len(self.updated()) == len(self.optimizer._trainable_variables)

    def are_all(self, variables: Sequence[Any]) -> bool:
        """Whether these are all variables that get a step, in order, as in Keras's loop."""
        known = self._updated
        return len(variables) == len(known) > 0 and all(map(operator.is_, variables, known))

    def decays(self, variable: Any) -> bool:
        return self.optimizer._use_weight_decay(variable)

    def groups(self, variables: Sequence[Any]) -> list[int]:
        """The place in `option_rows` of each variable's options."""
        return [0 if self.decays(it) else 1 for it in variables]

    def option_rows(self) -> list[dict[str, Any]]:
        """The rule's options, without lr: for variables that decay, and for the others."""
        decay = float(self.optimizer.weight_decay or 0)
        return [{**self.optimizer._options(), "weight_decay": it} for it in (decay, 0.0)]

    def mode(self) -> NonFinite:
        """What the optimizer's `nonfinite` means."""
        return mode_of(self.optimizer.nonfinite, self.optimizer.global_clipnorm)

    def skips(self, for_scaler: bool) -> bool:
        """Whether inf or nan skip a step. `for_scaler`: the loss was scaled."""
        return for_scaler or self.mode() != "propagate"

    def clipped(
        self, grads: Sequence[Any], scale: Any, for_scaler: bool
    ) -> tuple[Sequence[Any], Any]:
        """Gradients as `clipnorm` or `clipvalue` leaves them, and the scale that they still have.

        Keras's own functions clip each of them. If inf and nan skip a step, they stay.
        """
        optimizer, ops = self.optimizer, keras.ops
        if not (optimizer.clipnorm or optimizer.clipvalue):
            return grads, scale
        if scale is not None:
            grads = [it / ops.cast(scale, it.dtype) for it in grads]
        clipped = optimizer._clip_gradients(grads)
        if self.skips(for_scaler):
            pairs = zip(grads, clipped)
            clipped = [ops.where(ops.isfinite(grad), it, grad) for grad, it in pairs]
        return clipped, None

    @property
    @abstractmethod
    def grad_norm(self) -> Any:
        """The global gradient norm of the last step, before clipping: 0-d float32."""

    @property
    @abstractmethod
    def step_skipped(self) -> Any:
        """Whether the last step met inf or nan and changed nothing: 0-d bool."""

    @property
    @abstractmethod
    def skipped_steps(self) -> Any:
        """How many steps this object has skipped: a 0-d integer."""

    def check_stateless(self) -> None:
        """Raises NotImplementedError where `is_stateless` is False."""
        if not self.is_stateless:
            raise NotImplementedError(
                f"{type(self.optimizer).__name__}.stateless_apply() is not supported: the step "
                "changes variables in place; expected apply()"
            )

    def check_grads(self, grads: Sequence[Any], variables: Sequence[Any]) -> None:
        """Refuses what `check_grad` refuses, and another number of gradients than of variables."""
        if len(grads) != len(variables):
            raise ValueError(
                f"grads has {len(grads)} gradients; expected {len(variables)}, one for each "
                "variable"
            )
        for grad, variable in zip(grads, variables):
            self.check_grad(grad, variable)

    @abstractmethod
    def check_grad(self, grad: Any, variable: Any) -> None:
        """Raises TypeError if a gradient is no dense tensor of this backend."""

    @abstractmethod
    def apply(self, grads: Sequence[Any], variables: Sequence[Any], scale: Any) -> Any:
        """One call of Keras's `apply`, with as many gradients as variables, and at least one.

        It adds up gradients if the optimizer accumulates. Else, or when it is time, it takes a
        step of the optimizer's rule (`_options`, `_states`, `_scalars`) with its learning rate,
        weight decay and limit; if this is applied, constraints, moving averages and `_keep`
        follow, and `_iterations` counts it.

        Args:
            scale: None, or a tensor, by which the gradients are divided. Then a step is skipped
                if they hold inf or nan, whatever `nonfinite` is.

        Returns:
            Whether the step was applied, or only added up: a bool, or a tensor of the backend.
        """

    @abstractmethod
    def refresh(self) -> None:
        """Looks at the optimizer anew: other variables decay."""


def backend_class() -> type[Backend]:
    """The class for Keras's backend.

    Raises:
        ImportError: there is none, or it lacks something.
    """
    name = keras.config.backend()
    if name not in BACKENDS:
        raise _refusal(name)
    return getattr(importlib.import_module(f"fusedopt.keras.{name}_backend"), BACKENDS[name])


def check_shape(shape: Sequence[Any], variable: Any) -> None:
    """Raises ValueError if a gradient of this shape is none of the variable."""
    if tuple(shape) != tuple(variable.shape):
        raise ValueError(
            f"the gradient of {variable.path} has the shape {tuple(shape)}; expected "
            f"{tuple(variable.shape)}"
        )


def check_distinct(variables: Sequence[Any]) -> None:
    """Raises ValueError if a variable comes twice, as a step takes one gradient for each."""
    known: set[int] = set()
    for variable in variables:
        if id(variable) in known:
            raise ValueError(
                f"{variable.path} is twice in trainable_variables; expected it once, with the sum "
                "of its gradients"
            )
        known.add(id(variable))
