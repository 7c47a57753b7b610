"""The names of parameters: they belong to the parameters, wherever a group lists these."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fusedopt.reference import Group
from fusedopt.reference.groups import is_place, place_of

Names = list[list[Any]]  # of each group; None for a parameter without a name


class ParamNames:
    """A name for each parameter that has one; `group["param_names"]` is brought in line with it.

    torch keeps the names in a list beside that of the parameters. Whoever filters, reorders or
    appends to the one list leaves the other as it was, and then the names are those of other
    parameters. So what counts is the name that a parameter had when the two lists last agreed,
    unless the list of names was edited too: then it counts, by place, if it is as long.
    """

    def __init__(self, named: Iterable[tuple[Tensor, Any]] = ()) -> None:
        # By id, as not everything that is listed can be hashed. The parameter keeps its id from
        # being given to another object.
        self._named: dict[int, tuple[Any, Any]] = {id(param): (param, it) for param, it in named}
        # The lists of names as `follow` has left them, by id: each with a copy of what is in it.
        self._left: dict[int, tuple[Any, list[Any]]] = {}

    def of(self, param_groups: list[Group]) -> Names:
        """The names of the listed parameters; changes nothing."""
        named = self._known(param_groups)
        unnamed = (None, None)
        return [[named.get(id(p), unnamed)[1] for p in g["params"]] for g in param_groups]

    def follow(self, param_groups: list[Group], state: dict[Any, Any]) -> None:
        """Brings `group["param_names"]` in line with the lists of parameters.

        A parameter without a name is called by its place, as torch wants names for all or none. The
        name of one that is no longer listed is kept as long as it has a state: it may come back.
        """
        named = self._known(param_groups)
        there = {id(param) for group in param_groups for param in group["params"]}
        there.update(id(key) for key in state if isinstance(key, Tensor))
        self._named = {key: it for key, it in named.items() if key in there}
        names = filled(self.of(param_groups))
        left = {}
        for group, expected in zip(param_groups, names or (), strict=False):
            if group.get("param_names") != expected:
                group["param_names"] = expected
            left[id(group["param_names"])] = group["param_names"], expected.copy()
        self._left = left

    def add(self, named: Iterable[tuple[Tensor, str]]) -> None:
        """Gives names to parameters, whether they had one or not."""
        self._named = self._named | {id(param): (param, name) for param, name in named}

    def _known(self, param_groups: list[Group]) -> dict[int, tuple[Any, Any]]:
        """What is known, with what somebody has written into the lists of names since."""
        named = dict(self._named)
        for group in param_groups:
            names, params = group.get("param_names"), group["params"]
            if not isinstance(names, Sequence) or self._is_as_left(names):
                continue
            if len(names) != len(params):
                continue
            for param, name in zip(params, names, strict=True):
                if not is_place(name):
                    named[id(param)] = param, name
        return named

    def _is_as_left(self, names: Any) -> bool:
        left = self._left.get(id(names))
        return left is not None and left[0] is names and left[1] == list(names)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (list(self._named.values()),)


def filled(names: Names) -> list[list[Any]] | None:
    """`group["param_names"]` of each group, with places for what has no name; None: nothing has."""
    if all(name is None for group in names for name in group):
        return None
    return [
        [place_of(g, i) if name is None else name for i, name in enumerate(group)]
        for g, group in enumerate(names)
    ]


def check_named(named: Any) -> list[tuple[Tensor, str]]:
    """The parameters and names of a module, or of an iterable of (name, parameter).

    Raises:
        TypeError: it is something else.
        ValueError: two parameters have one name.
    """
    if isinstance(named, torch.nn.Module):
        named = named.named_parameters()
    expected = "expected a Module, or pairs (name, parameter) as of model.named_parameters()"
    if isinstance(named, Tensor | str) or not isinstance(named, Iterable):
        raise TypeError(f"name_params was given a {type(named).__name__}; {expected}")
    by_name: dict[str, Tensor] = {}
    for pair in named:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(f"name_params was given a {type(pair).__name__}; {expected}")
        name, param = pair
        if not isinstance(name, str) or not isinstance(param, Tensor):
            found = f"({type(name).__name__}, {type(param).__name__})"
            raise TypeError(f"name_params was given a pair of {found}; {expected}")
        if by_name.setdefault(name, param) is not param:
            raise ValueError(
                f"name_params was given two parameters with the name {name!r}; expected each name "
                "once: put a prefix before those of several models"
            )
    # A parameter that is listed under several names is called by the first.
    return [(param, name) for name, param in reversed(by_name.items())]
