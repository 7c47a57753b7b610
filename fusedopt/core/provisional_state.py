"""State that may not have been used yet, and counters that torch's state has no place for."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fusedopt.reference import Rule

States = dict[Tensor, dict[str, Any]]


class ProvisionalState:
    """What an optimizer knows of its state beside `optimizer.state`.

    A GPU skips a step without telling the host. So the host makes the state of a parameter's first
    step before it knows whether that step will be skipped: such a state is provisional, and enters
    no checkpoint, until its counter says that a step has used it.

    Attributes:
        counters: by parameter, the number of its state's steps, where torch's state has none: see
            `Rule.hidden_step`.
    """

    def __init__(self) -> None:
        self.counters: dict[Tensor, Tensor] = {}
        self._params: list[Tensor] = []

    def add(self, params: list[Tensor]) -> None:
        """Takes note of parameters whose state is new."""
        self._params += params

    def drop(self, params: list[Tensor], states: States) -> None:
        """Takes back a state that no step has used."""
        for param in params:
            states.pop(param, None)
            self.counters.pop(param, None)

    def unused(self, rule: Rule, states: States) -> list[Tensor]:
        """The parameters whose state no step has used. Waits for the device to learn of it."""
        self._params = [
            param
            for param in dict.fromkeys(self._params)
            if param in states and self._count_of(rule, param, states) == 0
        ]
        return self._params

    def _count_of(self, rule: Rule, param: Tensor, states: States) -> Tensor | None:
        """How many steps have used a parameter's state."""
        if rule.hidden_step:
            return self.counters.get(param)
        return states[param].get(rule.counter)
