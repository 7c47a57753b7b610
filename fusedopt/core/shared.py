"""Attributes that an optimizer has in common with whatever a trainer wraps around it.

Lightning and Fabric hand out a wrapper whose class derives from the optimizer's, and which looks up
in the optimizer what it lacks. What is set on it would stay in it: a scaler's `found_inf`, say. So
all that may be set lies in one dict, `_own`, which the wrapper finds in the optimizer.
"""

from __future__ import annotations

from typing import Any, Generic, TypeVar

Value = TypeVar("Value")

_REQUIRED: Any = object()


class Shared(Generic[Value]):
    """An attribute that is kept in its owner's `_own`, by its name."""

    def __init__(self, default: Value = _REQUIRED) -> None:
        self._default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, owner: Any, owner_type: type) -> Value:
        if owner is None:
            return self._default
        value = owner._own.get(self._name, self._default)
        if value is _REQUIRED:
            raise AttributeError(f"{owner_type.__name__!r} has no attribute {self._name!r} yet")
        return value

    def __set__(self, owner: Any, value: Value) -> None:
        owner._own[self._name] = value

    def __delete__(self, owner: Any) -> None:
        owner._own[self._name] = self._default
