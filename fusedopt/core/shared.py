"""Attributes that an optimizer shares with the wrappers that trainers put around it.

The wrapper of Lightning and Fabric has a class derived from the optimizer's. It looks up missing
attributes in the optimizer, but an attribute that is set on the wrapper, such as a scaler's
`found_inf`, would stay in the wrapper. So all attributes that may be set are in one dict, `_own`,
which the wrapper finds in the optimizer.
"""

from __future__ import annotations

from typing import Any, Generic, TypeVar

Value = TypeVar("Value")

_REQUIRED: Any = object()


class Shared(Generic[Value]):
    """An attribute whose value is in its owner's dict `_own`, under the attribute's name."""

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
