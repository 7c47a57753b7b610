"""The keys of the states in a parameter's state, in both forms; see `forms`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fusedopt.reference import Group, Rule
from fusedopt.reference.blocks import keys_of
from fusedopt.reference.formats import formats_of


def asked_keys(rule: Rule, group: Group) -> tuple[str, ...]:
    """The keys of the tensors in a state of the form that a group asks for."""
    names = rule.states(group)
    if not formats_of(group).in_blocks:
        return names
    return tuple(key for name in names for key in keys_of(name))


def found_keys(rule: Rule, group: Group, name: str, state: Mapping[str, Any]) -> tuple[str, ...]:
    """The keys under which a state has the state `name`; `(name,)` if it has none.

    If it has both forms, the one that the group asks for counts.
    """
    if name not in rule.codings:
        return (name,)
    has_values = state.get(name) is not None
    has_codes = all(state.get(key) is not None for key in keys_of(name))
    use_codes = has_codes and (formats_of(group).in_blocks or not has_values)
    return keys_of(name) if use_codes else (name,)


def scale_keys(rule: Rule) -> set[str]:
    """The keys of all scales, which are not shaped as the parameter."""
    return {keys_of(name)[1] for name in rule.codings}
