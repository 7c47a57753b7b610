"""torch's param groups, and the names of the parameters in them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

Group = dict[str, Any]

# Settings that a single group may have, True or False; where one is missing it is True.
GROUP_SETTINGS = ("clipped", "counted")

_PLACE = re.compile(r"parameter \d+ of param group \d+")


def is_clipped(group: Group) -> bool:
    """Whether the group's gradients are clipped, and count in the norm that clips."""
    return group.get("clipped", True)


def distinct_params(param_groups: list[Group]) -> Iterator[tuple[Group, Tensor]]:
    """Every parameter once, with its group. A parameter that is listed twice is updated once."""
    seen: set[int] = set()
    for group in param_groups:
        for param in group["params"]:
            if id(param) not in seen:
                seen.add(id(param))
                yield group, param


def place_of(group: int, index: int) -> str:
    """The name for a parameter without one. torch wants names for all parameters or for none."""
    return f"parameter {index} of param group {group}"


def is_place(name: object) -> bool:
    """Whether a name is one that `place_of` has made, for any place."""
    return isinstance(name, str) and _PLACE.fullmatch(name) is not None


def own_name(group: Group, index: int) -> Any:
    """The group's name for a parameter. None if it has none, or only a place."""
    names = group.get("param_names")
    if not isinstance(names, Sequence) or index >= len(names) or is_place(names[index]):
        return None
    return names[index]


def name_of(param_groups: list[Group], group: int, index: int) -> str:
    """A parameter's name for messages: its own name, if it has one, and its place."""
    where = place_of(group, index)
    name = own_name(param_groups[group], index)
    return where if name is None else f"{name!r} ({where})"


def named_params(param_groups: list[Group]) -> Iterator[tuple[Tensor, str]]:
    """Every parameter once, with its own name, or else with its place."""
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
