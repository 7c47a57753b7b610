"""The names of parameters. A name stays with its parameter when lists change."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fusedopt.reference import Group
from fusedopt.reference.groups import is_place, place_of

Names = list[list[Any]]  # a list per group; None for a parameter without a name


class ParamNames:
    """The names of parameters, and the lists `group["param_names"]` that follow from them.

    torch keeps a list of names next to the list of parameters. If code filters, reorders or extends
    the list of parameters only, the names no longer fit. So this class remembers each parameter's
    name from when the two lists last agreed. If the list of names was edited as well, the edited
    list counts, by place, if it has the right length.
    """

    def __init__(self, named: Iterable[tuple[Tensor, Any]] = ()) -> None:
        # The keys are ids, as not every listed object can be hashed. The value holds the parameter,
        # so that no other object gets its id.
        self._named: dict[int, tuple[Any, Any]] = {id(param): (param, it) for param, it in named}
        # The lists of names as `follow` has left them, by id, each with a copy of its contents.
        self._left: dict[int, tuple[Any, list[Any]]] = {}

    def of(self, param_groups: list[Group]) -> Names:
        """The names of the listed parameters. Changes nothing."""
        named = self._known(param_groups)
        unnamed = (None, None)
        return [[named.get(id(p), unnamed)[1] for p in g["params"]] for g in param_groups]

    def follow(self, param_groups: list[Group], state: dict[Any, Any]) -> None:
        """Brings `group["param_names"]` in line with the lists of parameters.

        torch wants names for all parameters or for none, so a parameter without a name is named by
        its place. The name of a parameter that is no longer listed is kept as long as the parameter
        has a state, as it may come back.
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
        """Gives names to parameters, and replaces the names that they had."""
        self._named = self._named | {id(param): (param, name) for param, name in named}

    def _known(self, param_groups: list[Group]) -> dict[int, tuple[Any, Any]]:
        """The known names, with all later edits of the lists of names."""
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
    """Checks the pairs of (name, parameter) of a module or an iterable, and returns them.

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
    # A parameter that is listed under several names gets the first one.
    return [(param, name) for name, param in reversed(by_name.items())]
