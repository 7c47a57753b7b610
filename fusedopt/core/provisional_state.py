"""State that no step may have used yet, and counters that torch's state does not have."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fusedopt.core.state import States
from fusedopt.reference import Rule, all_state_names


class ProvisionalState:
    """Facts about an optimizer's state that `optimizer.state` does not hold.

    A GPU skips a step without telling the host. So the host makes the state for a parameter's first
    step before it knows whether the step will be skipped. Such a state is provisional: it enters no
    checkpoint until its counter shows that a step has used it.

    Attributes:
        counters: for each parameter, the number of steps that have used its state, if torch's class
            keeps no such number: see `Rule.hidden_step`.
    """

    def __init__(self) -> None:
        self.counters: dict[Tensor, Tensor] = {}
        self._params: list[Tensor] = []

    def add(self, params: list[Tensor]) -> None:
        """Remembers parameters whose state is new."""
        self._params += params

    def drop(self, params: list[Tensor], states: States) -> None:
        """Removes state that no step has used."""
        for param in params:
            self.counters.pop(param, None)
            state = states.get(param)
            if not isinstance(state, dict):  # the rule has no state
                continue
            for name in all_state_names():
                state.pop(name, None)
            if not state:
                states.pop(param, None)

    def used(self, rule: Rule, states: States) -> States:
        """`states` without those that no step has used. Waits for the device."""
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
    """The items that a user keeps in a parameter's state."""
    return {key: value for key, value in state.items() if key not in all_state_names()}
