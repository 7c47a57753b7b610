"""The step of torch's fused classes over the memory of Keras's variables."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fusedopt.core.optimizer import FusedOptimizer

foreach: Any = torch  # torch's functions over lists have private names


class TorchStep:
    """The step of torch's fused class, over the memory of Keras's variables.

    Args:
        cls: torch's fused class.
        variables: the model's variables.
        decays: for each variable, whether its weight decays in the step.
        states: for each state of the rule, by its name, the optimizer's variables.
    """

    def __init__(
        self,
        cls: type[FusedOptimizer],
        variables: Sequence[Any],
        decays: Sequence[bool],
        states: dict[str, list[Any]],
        **options: Any,
    ) -> None:
        self.params: list[Tensor] = [variable.value for variable in variables]
        self.variables = list(variables)
        self.constrained = [it for it in variables if it.constraint is not None]
        self._index = {id(variable): i for i, variable in enumerate(variables)}
        groups: dict[bool, list[Any]] = {True: [], False: []}
        for variable, param, decay in zip(variables, self.params, decays):
            groups[decay].append((variable.path, param))
        split = [{"params": group, "decays": key} for key, group in groups.items() if group]
        self.optimizer: Any = cls(split, lr=0.0, **options)  # pyright: ignore[reportCallIssue]
        self._scalars: dict[str, list[Tensor]] = {name: [] for name in cls.rule.scalars}
        self._left: dict[str, float] = {}
        for i, param in enumerate(self.params):
            state = {name: kept[i].value.detach() for name, kept in states.items()}
            for name, values in self._scalars.items():
                values.append(torch.zeros((), device=param.device))
                state[name] = values[-1]
            if state:
                self.optimizer.state[param] = state

    def set_scalars(self, now: dict[str, float]) -> None:
        """Keras has one counter for all variables. The kernels have one for each."""
        for name, value in now.items():
            if self._left.get(name) != value:
                foreach._foreach_zero_(self._scalars[name])
                foreach._foreach_add_(self._scalars[name], value)

    def keep_scalars(self, partial: bool) -> dict[str, float]:
        """The numbers that the step left. They are lost if some parameters had no gradient."""
        first = next(i for i, param in enumerate(self.params) if param.grad is not None)
        left = {name: values[first].item() for name, values in self._scalars.items()}
        self._left = {} if partial else left
        return left

    @contextmanager
    def gradients(self, grads: Sequence[Tensor], variables: Sequence[Any]) -> Iterator[bool]:
        """Gives the parameters these gradients, and later those that they had.

        Yields whether some parameters have none.
        """
        wanted: list[Tensor | None] = [*grads]
        if not self.is_all(variables):
            wanted = [None] * len(self.params)
            for grad, variable in zip(grads, variables):
                wanted[self._index[id(variable)]] = grad
        before = [param.grad for param in self.params]
        same = all(map(operator.is_, before, wanted))
        try:
            if not same:
                for param, grad in zip(self.params, wanted):
                    param.grad = None if grad is None else grad.to(param.dtype)
            yield len(grads) < len(self.params)
        finally:
            if not same:
                for param, grad in zip(self.params, before):
                    param.grad = grad

    def is_all(self, variables: Sequence[Any]) -> bool:
        """Whether these are all variables, in order, as Keras's training loop has them."""
        known = self.variables
        return len(variables) == len(known) and all(map(operator.is_, variables, known))
