"""The error for gradients that hold inf or nan, and checks that need no torch."""

from __future__ import annotations

import numbers
from typing import Any, Literal

NonFinite = Literal["skip", "raise", "propagate"]
NONFINITE_MODES = ("skip", "raise", "propagate")


class NonFiniteGradientError(RuntimeError):
    """Gradients held inf or nan, and `nonfinite` is "raise". Nothing was changed.

    Attributes:
        names: the parameters of these gradients.
        description: the parameters and the numbers of inf and nan, in words.
    """

    def __init__(self, names: list[str], description: str) -> None:
        super().__init__(
            f"inf or nan in the gradients: {description}. Parameters and state are as they were "
            "before the step"
        )
        self.names = names
        self.description = description

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.names, self.description)


def mode_of(nonfinite: NonFinite | None, limit: Any) -> NonFinite:
    """What `nonfinite` means with this limit of the norm, or without one (None)."""
    return nonfinite or ("propagate" if limit is None else "skip")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> Any:
    """Refuses a value that is neither None nor one of the choices."""
    if value is not None and value not in choices:
        expected = ", ".join(map(repr, choices))
        raise ValueError(f"Invalid {name} value: {value!r}; expected one of {expected} or None")
    return value


def check_limit(name: str, value: Any) -> None:
    """Refuses a limit of the norm that is neither None nor a number above 0."""
    if value is not None and not (isinstance(value, numbers.Real) and float(value) > 0):
        raise ValueError(f"Invalid {name} value: {value}; expected a float > 0 or None")
