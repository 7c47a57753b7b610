"""The base of all classes here: Keras's protocol around one fused step."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import NoneType
from typing import Any, ClassVar

from fusedopt.core.nonfinite import NonFinite, check_choice, check_limit
from fusedopt.keras.backend import backend_class, check_distinct, keras

Backend = backend_class()


class FusedKerasOptimizer(keras.optimizers.Optimizer):
    """What the fused classes have in addition to Keras's.

    * `global_clipnorm` is torch's `max_grad_norm`: the norm is measured without overflow, and
      clipping costs no pass of its own.
    * `nonfinite` (keyword only): "skip" leaves all variables as they were if a gradient holds inf
      or nan, "raise" raises `NonFiniteGradientError` as well (on torch), "propagate" updates as
      Keras does. None is "skip" with `global_clipnorm`, else "propagate".
    * `grad_norm`, `step_skipped`, `skipped_steps`: 0-d tensors.

    `iterations` counts the steps that were applied. `clipnorm` and `clipvalue` clip as in Keras, in
    passes of their own before the step; `grad_norm` is then that of the clipped gradients.

    Raises:
        ValueError, TypeError: an argument is refused; the message names it.
    """

    rule: ClassVar[str]

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
        self._check_settings()
        self._backend = Backend(self)

    @classmethod
    def from_keras(cls, optimizer: Any) -> Any:
        """An optimizer with the config and the variables of Keras's own, as of a loaded model.

        Args:
            optimizer: of the class that this one is derived from.

        Raises:
            TypeError: it is of another class.
            ValueError: it has a setting that is refused.
        """
        if not isinstance(optimizer, cls.__bases__[-1]):
            raise TypeError(
                f"from_keras() got a {type(optimizer).__name__}; expected a "
                f"{cls.__bases__[-1].__name__}"
            )
        result = cls.from_config(optimizer.get_config())
        if optimizer.built:
            result.build(optimizer._trainable_variables)
            for variable, value in zip(result._variables, optimizer._variables, strict=True):
                variable.assign(value)
        return result

    def _check_settings(self) -> None:
        check_limit("global_clipnorm", self.global_clipnorm)
        check_choice("nonfinite", self.nonfinite, Backend.nonfinite_modes)

    @property
    def grad_norm(self) -> Any:
        """The global gradient norm of the last step, before clipping: 0-d float32."""
        return self._backend.grad_norm

    @property
    def step_skipped(self) -> Any:
        """Whether the last step met inf or nan and changed nothing: 0-d bool."""
        return self._backend.step_skipped

    @property
    def skipped_steps(self) -> Any:
        """How many steps this object has skipped. It is not saved: a 0-d integer."""
        return self._backend.skipped_steps

    @property
    def variables(self) -> list[Any]:
        """Keras's variables, and on JAX the readings. These are not saved."""
        return [*super().variables, *self._backend.variables]

    def save_own_variables(self, store: Any) -> None:
        """Saves the variables of Keras's class."""
        with self._without_readings():
            super().save_own_variables(store)

    def load_own_variables(self, store: Any) -> None:
        """Loads the variables of Keras's class."""
        with self._without_readings():
            super().load_own_variables(store)

    @contextmanager
    def _without_readings(self) -> Iterator[None]:
        readings, self._backend.variables = self._backend.variables, []
        try:
            yield
        finally:
            self._backend.variables = readings

    def get_config(self) -> dict[str, Any]:
        """Keras's config. `nonfinite` is in it if it is not None."""
        config = super().get_config()
        return config if self.nonfinite is None else {**config, "nonfinite": self.nonfinite}

    def exclude_from_weight_decay(self, var_list: Any = None, var_names: Any = None) -> None:
        """As Keras's: these variables, or those whose names hold one of the strings."""
        super().exclude_from_weight_decay(var_list, var_names)
        self._backend.refresh()

    def stateless_apply(self, *args: Any, **kwargs: Any) -> Any:
        """As Keras's, on its JAX backend. On others it is refused, as the step is in place."""
        self._backend.check_stateless()
        return super().stateless_apply(*args, **kwargs)

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

    def _apply_scaled(self, grads: Any, variables: Any, scale: Any) -> Any:
        """As `apply`, for gradients of a loss times `scale`. Returns whether it was applied."""
        if len(grads) == 0:
            return True
        self._check_settings()
        grads, variables = self._pairs(grads, variables)
        if not grads:
            self._iterations.assign_add(1)
            return True
        return self._backend.apply(grads, variables, scale)

    def _pairs(self, grads: Any, variables: Any) -> tuple[list[Any], list[Any]]:
        """The gradients that there are, and their variables."""
        grads = list(grads)
        missing = NoneType in {*map(type, grads)}
        if missing or variables is None or not self._backend.are_all(variables):
            variables = self._built_for(grads, variables)
            grads, variables = self._filter_empty_gradients(grads, variables)
            grads, variables = self._overwrite_variables_directly_with_gradients(grads, variables)
        self._backend.check_grads(grads, variables)
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
        check_distinct(variables)
        if not self.built:
            with keras.name_scope(self.name, caller=self):
                self.build(variables)
        self._check_variables_are_known(variables)
        return variables

    def _options(self) -> dict[str, Any]:
        """The options of the rule by torch's names, but for lr and weight_decay."""
        raise NotImplementedError

    def _states(self) -> dict[str, Any]:
        """The optimizer's variables, by the names of the rule's states."""
        raise NotImplementedError

    def _scalars(self) -> dict[str, Any]:
        """The numbers that the rule's scalars start this step from, by their names."""
        return {"step": self.iterations}

    def _keep(self, scalars: dict[str, Any]) -> None:
        """Takes over the rule's scalars after a step that was applied."""
