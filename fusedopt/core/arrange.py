"""Finds the parameters of a checkpoint: by name if it has names, else by place as torch does."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from fusedopt.core.names import Names, filled
from fusedopt.reference import Group
from fusedopt.reference.groups import own_name, place_of

# Prefixes that wrappers put into the names of a model's parameters.
_WRAPPERS = re.compile(
    r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.|^(module\.)+"
)
_SHOWN = 3  # the number of names in an error
_BY_PLACE = "To load by place, as torch does, delete 'param_names' from its param groups"


def arranged(own: Names, groups: list[Group]) -> list[Group]:
    """A checkpoint's param groups, with their lists in the order of an optimizer.

    Args:
        own: the names of the optimizer's parameters.
        groups: the checkpoint's groups, as many as the optimizer's. If ids are strings, they are
            names that `torch.distributed.checkpoint` has written, and are in order already.

    Raises:
        ValueError: the names or the groups belong to other parameters.
    """
    here = [[_bare(name) for name in group] for group in own]
    there = [[_bare(name) for name in _saved_names(group)] for group in groups]
    where = _places(there)
    if not _agree(here, there):
        if where is not None and where.keys() == (_places(here) or {}).keys():
            groups = [_gathered(g, names, groups, where) for g, names in enumerate(here)]
        elif not any(map(_has_string_ids, groups)):
            _check_sizes(own, groups)
            raise ValueError(_contradiction(own, groups, here, there))
    _check_sizes(own, groups)
    return groups


def _check_sizes(own: Names, groups: list[Group]) -> None:
    for index, (names, group) in enumerate(zip(own, groups, strict=True)):
        for key in ("params", "param_names"):
            if key in group and len(group[key]) != len(names):
                raise ValueError(
                    "loaded state dict contains a parameter group that doesn't match the size of "
                    f"optimizer's group: param group {index} has {len(group[key])} in its "
                    f"{key!r}; expected {len(names)}"
                )


def loaded_names(own: Names, groups: list[Group]) -> list[list[Any]] | None:
    """`group["param_names"]` after loading: the optimizer's names, else the checkpoint's.

    Args:
        own: the names of the optimizer's parameters.
        groups: the result of `arranged`.
    """
    saved = [
        _saved_names(group) if "param_names" in group else [None] * len(group["params"])
        for group in groups
    ]
    return filled(own) or filled(saved)


def _saved_names(group: Group) -> list[Any]:
    if _has_string_ids(group):
        return list(group["params"])
    return [own_name(group, i) for i in range(len(group["params"]))]


def _has_string_ids(group: Group) -> bool:
    return len(group["params"]) > 0 and all(isinstance(key, str) for key in group["params"])


def _bare(name: Any) -> Any:
    """A name without the prefixes of DistributedDataParallel, torch.compile and other wrappers."""
    if isinstance(name, str):
        return _WRAPPERS.sub("", name)
    return None if name is None else repr(name)  # torch takes any object; some have no hash


def _agree(here: Names, there: Names) -> bool:
    """Whether no place has two different names."""
    if not any(n is not None for g in here for n in g) or not any(
        n is not None for g in there for n in g
    ):
        return True
    return [len(names) for names in here] == [len(names) for names in there] and all(
        a is None or b is None or a == b
        for names, others in zip(here, there, strict=True)
        for a, b in zip(names, others, strict=True)
    )


def _places(names: Names) -> dict[Any, tuple[int, int]] | None:
    """The place of each name. None if a name is missing, or stands for two parameters."""
    found = {name: (g, i) for g, group in enumerate(names) for i, name in enumerate(group)}
    count = sum(map(len, names))
    return found if len(found) == count and None not in found else None


def _gathered(
    index: int, names: Sequence[Any], groups: list[Group], where: dict[Any, tuple[int, int]]
) -> Group:
    """The saved group that has these names, with its lists in their order."""
    sources = sorted({where[name][0] for name in names}) or _empty(groups, index)
    group = groups[sources[0]]
    if len(sources) > 1 or len(group["params"]) != len(names):
        places = _and_more([f"{n!r} in group {where[n][0]}" for n in names])
        raise ValueError(
            f"loaded state dict has other param groups: what is here in param group {index} is "
            f"there {places}. {_BY_PLACE}"
        )
    order = [where[name][1] for name in names]
    listed = {key: group[key] for key in ("params", "param_names") if key in group}
    return {**group, **{key: [them[i] for i in order] for key, them in listed.items()}}


def _empty(groups: list[Group], index: int) -> list[int]:
    """The saved group for an empty group: the one at the same place, if possible."""
    found = [g for g, group in enumerate(groups) if len(group["params"]) == 0]
    return [index] if index in found or not found else found[:1]


def _contradiction(own: Names, groups: list[Group], here: Names, there: Names) -> str:
    g, i = next(
        (g, i)
        for g, names in enumerate(here)
        for i, name in enumerate(names)
        if name is not None and there[g][i] is not None and name != there[g][i]
    )
    words = [f"{place_of(g, i)} is {_saved_names(groups[g])[i]!r} there, and {own[g][i]!r} here"]
    ours, theirs = ({name for names in it for name in names} - {None} for it in (here, there))
    for what, found in (("not there are", ours - theirs), ("not here are", theirs - ours)):
        if found:
            words.append(f"{what} {_and_more(sorted(map(repr, found)))}")
    return (
        f"loaded state dict is of parameters with other names: {'; '.join(words)}. Expected: the "
        f"same names, in any order. {_BY_PLACE}"
    )


def _and_more(words: list[str]) -> str:
    more = f" and {len(words) - _SHOWN} more" if len(words) > _SHOWN else ""
    return ", ".join(words[:_SHOWN]) + more
