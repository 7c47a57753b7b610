"""Param groups as torch has them, and what to call the parameters in them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

Group = dict[str, Any]


def distinct_params(param_groups: list[Group]) -> Iterator[tuple[Group, Tensor]]:
    """Every parameter with its group, once: one that is listed again is updated once."""
    seen: set[int] = set()
    for group in param_groups:
        for param in group["params"]:
            if id(param) not in seen:
                seen.add(id(param))
                yield group, param


def name_of(param_groups: list[Group], group: int, index: int) -> str:
    """What to call a parameter: its name, if it has one, and where it is listed."""
    where = _place_of(group, index)
    names = param_groups[group].get("param_names")
    return f"{names[index]!r} ({where})" if names else where


def named_params(param_groups: list[Group]) -> Iterator[tuple[Tensor, str]]:
    """Every parameter once, with its name; where it has none of its own, with its place."""
    params: set[int] = set()
    taken: set[str] = set()
    for g, group in enumerate(param_groups):
        names = group.get("param_names")
        for i, param in enumerate(group["params"]):
            if id(param) not in params:
                name = names[i] if names and names[i] not in taken else _place_of(g, i)
                params.add(id(param))
                taken.add(name)
                yield param, name


def _place_of(group: int, index: int) -> str:
    return f"parameter {index} of param group {group}"
