"""Param groups as torch has them, and what to call the parameters in them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

Group = dict[str, Any]

_PLACE = re.compile(r"parameter \d+ of param group \d+")


def distinct_params(param_groups: list[Group]) -> Iterator[tuple[Group, Tensor]]:
    """Every parameter with its group, once: one that is listed again is updated once."""
    seen: set[int] = set()
    for group in param_groups:
        for param in group["params"]:
            if id(param) not in seen:
                seen.add(id(param))
                yield group, param


def place_of(group: int, index: int) -> str:
    """What to call a parameter that has no name. torch wants names for all parameters or none."""
    return f"parameter {index} of param group {group}"


def is_place(name: object) -> bool:
    """Whether a name only says where its parameter was listed at some time."""
    return isinstance(name, str) and _PLACE.fullmatch(name) is not None


def own_name(group: Group, index: int) -> Any:
    """The name that a group has for a parameter; None: it has none, or only a place."""
    names = group.get("param_names")
    if not isinstance(names, Sequence) or index >= len(names) or is_place(names[index]):
        return None
    return names[index]


def name_of(param_groups: list[Group], group: int, index: int) -> str:
    """What to call a parameter: its name, if it has one, and where it is listed."""
    where = place_of(group, index)
    name = own_name(param_groups[group], index)
    return where if name is None else f"{name!r} ({where})"


def named_params(param_groups: list[Group]) -> Iterator[tuple[Tensor, str]]:
    """Every parameter once, with its name; where it has none of its own, with its place."""
    params: set[int] = set()
    taken: set[str] = set()
    for g, group in enumerate(param_groups):
        for i, param in enumerate(group["params"]):
            if id(param) not in params:
                name = own_name(group, i)
                name = place_of(g, i) if name is None or name in taken else name
                params.add(id(param))
                taken.add(name)
                yield param, name
