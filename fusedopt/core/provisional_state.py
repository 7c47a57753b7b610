"""State that may not have been used yet, and counters that torch's state has no place for."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fusedopt.core.state import States
from fusedopt.reference import Rule, all_state_names


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
            self.counters.pop(param, None)
            state = states.get(param)
            if not isinstance(state, dict):  # a rule without state left it as it was
                continue
            for name in all_state_names():
                state.pop(name, None)
            if not state:
                states.pop(param, None)

    def used(self, rule: Rule, states: States) -> States:
        """`states` without what no step has used. Waits for the device to learn of it."""
        self._params = [
            param
            for param in dict.fromkeys(self._params)
            if param in states and self._count_of(rule, param, states) == 0
        ]
        used = states if not self._params else dict(states)
        for param in self._params:
            if users := _users(used.pop(param)):
                used[param] = users
        return used

    def _count_of(self, rule: Rule, param: Tensor, states: States) -> Tensor | None:
        """How many steps have used a parameter's state."""
        if rule.hidden_step:
            return self.counters.get(param)
        return states[param].get(rule.counter)


def _users(state: dict[str, Any]) -> dict[str, Any]:
    """What a user keeps in a parameter's state."""
    return {key: value for key, value in state.items() if key not in all_state_names()}
