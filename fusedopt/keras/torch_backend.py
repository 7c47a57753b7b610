"""Keras's torch backend: the step of torch's fused classes over the memory of Keras's variables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from fusedopt.core import backends
from fusedopt.core.nonfinite import NONFINITE_MODES
from fusedopt.core.optimizer import FusedOptimizer
from fusedopt.keras.backend import Backend
from fusedopt.optimizers.adam import FusedAdam
from fusedopt.optimizers.nadam import FusedNAdam
from fusedopt.optimizers.rmsprop import FusedRMSprop
from fusedopt.optimizers.sgd import FusedSGD

foreach: Any = torch  # torch's functions over lists have private names
CLASSES = {cls.rule.name: cls for cls in (FusedAdam, FusedNAdam, FusedRMSprop, FusedSGD)}
READINGS = {
    "grad_norm": torch.float32,
    "step_skipped": torch.bool,
    "skipped_steps": torch.int64,
}


class TorchBackend(Backend):
    """A step of torch's class."""

    nonfinite_modes = NONFINITE_MODES
    torch_options: ClassVar[dict[str, Any]] = {}  # arguments of torch's class

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer)
        self._step: TorchStep | None = None

    @property
    def grad_norm(self) -> Tensor:
        return self._reading("grad_norm")

    @property
    def step_skipped(self) -> Tensor:
        return self._reading("step_skipped")

    @property
    def skipped_steps(self) -> Tensor:
        return self._reading("skipped_steps")

    def _reading(self, name: str) -> Tensor:
        if self._step is None:
            return torch.zeros((), dtype=READINGS[name])
        return getattr(self._step.optimizer, name)

    def check_grads(self, grads: Sequence[Any], variables: Sequence[Any]) -> None:
        if len(grads) != len(variables) or {*map(type, grads)} != {Tensor}:
            super().check_grads(grads, variables)

    def check_grad(self, grad: Any, variable: Any) -> None:
        if not isinstance(grad, Tensor):
            raise TypeError(
                f"the gradient of {variable.path} is a {type(grad).__name__}; expected a dense "
                "torch tensor"
            )

    def refresh(self) -> None:
        self._step = None

    @torch.no_grad()
    def apply(self, grads: Sequence[Any], variables: Sequence[Any], scale: Any) -> bool:
        optimizer = self.optimizer
        if optimizer.gradient_accumulation_steps:
            applied = self._accumulate(grads, variables)
        else:
            factor = optimizer.loss_scale_factor
            if scale is None and factor is not None:
                scale = torch.tensor(float(factor), device=grads[0].device)
            applied = self._take_step(grads, variables, scale, scale is not None)
        if applied:
            optimizer._iterations.assign_add(1)
        return applied

    def _accumulate(self, grads: Sequence[Tensor], variables: Sequence[Any]) -> bool:
        """Adds gradients up, and takes a step with their average when it is time."""
        optimizer = self.optimizer
        every, all_sums = optimizer.gradient_accumulation_steps, optimizer._accumulated_gradients
        kept = [all_sums[optimizer._get_variable_index(it)] for it in variables]
        sums = [it.value.detach() for it in kept]
        foreach._foreach_add_(sums, list(grads), alpha=1 / (optimizer.loss_scale_factor or 1))
        if (int(optimizer._iterations) + 1) % every != 0:
            self._average()
            return True
        applied = False
        try:
            scale = torch.tensor(float(every), device=sums[0].device)
            applied = self._take_step(sums, variables, scale, False)
        finally:
            foreach._foreach_zero_([it.value.detach() for it in all_sums if it is not None])
            if not applied:
                optimizer._iterations.assign_sub(every - 1)
        return applied

    def _take_step(
        self, grads: Any, variables: Any, scale: Tensor | None, for_scaler: bool
    ) -> bool:
        """One step by torch's class, and what Keras does after it. Returns whether it was applied.

        Args:
            scale: the gradients are divided by it.
            for_scaler: whether the loss was scaled. Then an overflow skips: it is expected.
        """
        keras_optimizer = self.optimizer
        grads, scale = self.clipped(grads, scale, for_scaler)
        step = self._step = self._step or self._new_step()
        optimizer = step.optimizer
        optimizer.max_grad_norm = keras_optimizer.global_clipnorm
        optimizer.nonfinite = keras_optimizer.nonfinite
        optimizer.grad_scale, optimizer.skips_for_scaler = scale, for_scaler
        step.set_options(
            lr=float(keras_optimizer.learning_rate),
            weight_decay=float(keras_optimizer.weight_decay or 0),
            **keras_optimizer._options(),
        )
        step.set_scalars({key: float(it) for key, it in keras_optimizer._scalars().items()})
        some = None if self.are_all(variables) else variables
        with step.gradients(grads, some):
            optimizer.step()
        applied = not optimizer.step_skipped
        left = step.keep_scalars(some)
        if applied:
            keras_optimizer._keep(left)
            for variable in variables if step.constrained else ():
                if variable.constraint is not None:
                    variable.assign(variable.constraint(variable))
            self._average()
        return applied

    def _new_step(self) -> TorchStep:
        optimizer = self.optimizer
        variables, states = self.updated(), optimizer._states()
        known = {name: [it for it in kept if it is not None] for name, kept in states.items()}
        decays = [self.decays(variable) for variable in variables]
        cls = CLASSES[optimizer.rule]
        return TorchStep(cls, variables, decays, known, optimizer._options(), self.torch_options)

    def _average(self) -> None:
        """Keras's moving average of the variables."""
        optimizer = self.optimizer
        if optimizer.use_ema:
            known = optimizer._trainable_variables
            optimizer._update_model_variables_moving_average(known)
            every = optimizer.ema_overwrite_frequency
            if every and (int(optimizer.iterations) + 1) % every == 0:
                optimizer._overwrite_model_variables_with_average_value(known)


class TorchStep:
    """The step of torch's fused class, over the memory of Keras's variables.

    Args:
        cls: torch's fused class.
        variables: the model's variables.
        decays: for each variable, whether its weight decays.
        states: for each state of the rule, by its name, the optimizer's variables.
        options: the options of the rule.
        arguments: more arguments of the class.
    """

    def __init__(
        self,
        cls: type[FusedOptimizer],
        variables: Sequence[Any],
        decays: Sequence[bool],
        states: dict[str, list[Any]],
        options: dict[str, Any],
        arguments: dict[str, Any],
    ) -> None:
        self.params: list[Tensor] = [variable.value for variable in variables]
        self.constrained = any(it.constraint is not None for it in variables)
        self._index = {id(variable): i for i, variable in enumerate(variables)}
        groups: dict[bool, list[Any]] = {True: [], False: []}
        for variable, param, decay in zip(variables, self.params, decays):
            groups[decay].append((variable.path, param))
        split = [
            {"params": group, "decays": key, **options} for key, group in groups.items() if group
        ]
        self.optimizer: Any = cls(split, lr=0.0, **arguments)  # pyright: ignore[reportCallIssue]
        self._scalars: dict[str, list[Tensor]] = {name: [] for name in cls.rule.scalars}
        self._left: dict[str, float] = {}
        for i, param in enumerate(self.params):
            state = {name: kept[i].value.detach() for name, kept in states.items()}
            for name, values in self._scalars.items():
                values.append(torch.zeros((), device=param.device))
                state[name] = values[-1]
            if state:
                self.optimizer.state[param] = state

    def set_options(self, lr: float, weight_decay: float, **options: Any) -> None:
        for group in self.optimizer.param_groups:
            group.update(options, lr=lr, weight_decay=weight_decay if group["decays"] else 0.0)

    def set_scalars(self, now: dict[str, float]) -> None:
        """Keras has one counter for all variables. The kernels have one for each."""
        for name, values in self._scalars.items():
            if self._left.get(name) != now[name]:
                foreach._foreach_zero_(values)
                foreach._foreach_add_(values, now[name])

    def keep_scalars(self, variables: Sequence[Any] | None) -> dict[str, float]:
        """The numbers that the step left. They differ if some parameters had no gradient.

        Args:
            variables: those that had one. None: all.
        """
        first = 0 if variables is None else self._index[id(variables[0])]
        left = {name: values[first].item() for name, values in self._scalars.items()}
        self._left = left if variables is None else {}
        return left

    @contextmanager
    def gradients(self, grads: Sequence[Tensor], variables: Sequence[Any] | None) -> Iterator[None]:
        """Gives the parameters these gradients, and later those that they had.

        Args:
            variables: those of the gradients. None: all, in order.
        """
        wanted: list[Tensor | None] = [*grads]
        if variables is not None:
            wanted = [None] * len(self.params)
            for grad, variable in zip(grads, variables):
                wanted[self._index[id(variable)]] = grad
        before = swap_grads(self.params, wanted)
        try:
            yield
        finally:
            if before is not None:
                swap_grads(self.params, before)


def swap_grads(params: list[Tensor], grads: list[Tensor | None]) -> list[Tensor | None] | None:
    """Gives parameters these gradients, in their dtypes.

    Returns those that they had, or None if they had these.
    """
    compiled = backends.compiled()
    if compiled is not None:
        return compiled.swap_grads(params, grads)
    before = [param.grad for param in params]
    cast = [None if it is None else it.to(param.dtype) for param, it in zip(params, grads)]
    try:
        _place(params, cast)
    except RuntimeError:  # torch refuses a gradient of another shape
        _place(params, before)
        raise
    return before


def _place(params: list[Tensor], grads: list[Tensor | None]) -> None:
    for param, grad in zip(params, grads):
        param.grad = grad
