"""A rule of the kernels with the numbers that optax's arguments stand for."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from fusedopt.core import c_library

STAND_IN = 0.5  # for a number that isn't known yet: every option may have it


def is_traced(value: Any) -> bool:
    """Whether the compiled program gets this number at every step."""
    return callable(value) or isinstance(value, jax.Array)


class Formula(NamedTuple):
    """A rule with options.

    Attributes:
        rule: its name.
        options: per group of parameters, the options by torch's names. A number may be an array, or
            a function of the count of steps.
        max_grad_norm: see `adamw`. It may be an array.
        skip_nonfinite: whether a step is skipped if a gradient holds inf or nan.
        first_values: names and first values of states that don't begin with zeros.
        factors: of the rule's scalars after the first, the options that every step multiplies them
            by.
    """

    rule: str
    options: tuple[dict[str, Any], ...]
    max_grad_norm: Any
    skip_nonfinite: bool
    first_values: tuple[tuple[str, Any], ...] = ()
    factors: tuple[str, ...] = ()

    def numbers(self) -> list[Any]:
        """Those of all options of all groups, in the order of the kernels, and then the limit."""
        limit = math.inf if self.max_grad_norm is None else self.max_grad_norm
        numbers = (it for group in self.options for it in c_library.in_order(self.rule, group))
        return [*numbers, limit]

    def constants(self) -> NDArray[np.float64]:
        """All numbers, with `STAND_IN` in the places of those that are traced."""
        known = (STAND_IN if is_traced(it) else float(it) for it in self.numbers())
        return np.array([*known], np.float64)

    def places(self) -> NDArray[np.int32]:
        """The indices of the numbers that are traced."""
        return np.flatnonzero([is_traced(it) for it in self.numbers()]).astype(np.int32)

    def traced(self, count: jax.Array) -> jax.Array:
        """The numbers that are traced, for the step after `count` others: float32."""
        values = [it(count) if callable(it) else it for it in self.numbers() if is_traced(it)]
        return jnp.array([jnp.asarray(it, jnp.float32) for it in values], jnp.float32)

    def factor_places(self) -> NDArray[np.int32]:
        """The indices of the numbers that multiply the rule's scalars."""
        counts = c_library.load().rules[self.rule].options
        names, lengths = [*counts], [*counts.values()]
        return np.array([sum(lengths[: names.index(it)]) for it in self.factors], np.int32)

    def decays(self) -> bool:
        """Whether a step also depends on the parameters."""
        rates = [group.get("weight_decay", 0.0) for group in self.options]
        return any(is_traced(it) or it != 0 for it in rates)

    def used(self) -> list[str]:
        """The names of the states that the rule uses.

        Raises:
            ValueError: an option is out of range.
        """
        return c_library.states_used(self.rule, self.constants().ctypes.data)
