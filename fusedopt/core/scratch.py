"""Arrays that a rule's kernels write, and that are no part of its state; see `Rule.scratch`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedopt.core.state import States
from fusedopt.reference import Rule


def with_scratch(rule: Rule, states: States, seen: States) -> States:
    """The states of a rule with its scratch arrays: the same dicts and arrays at every call.

    Args:
        seen: what earlier calls have made, by parameter.
    """
    for param in [param for param in seen if param not in states]:
        del seen[param]
    return {param: _with_arrays(rule, param, entry, seen) for param, entry in states.items()}


def _with_arrays(rule: Rule, param: Any, entry: Any, seen: States) -> Any:
    like = entry.get(rule.tensors[0]) if isinstance(entry, dict) else None
    if not isinstance(like, Tensor):
        return entry  # a state without this rule's arrays
    known = seen.setdefault(param, {})
    wanted = {**entry, **{name: _array(known.get(name), like) for name in rule.scratch}}
    if [*known] != [*wanted] or any(known[name] is not it for name, it in wanted.items()):
        known.clear()  # a plan is told of every change of a dict
        known.update(wanted)
    return known


def _array(known: Tensor | None, like: Tensor) -> Tensor:
    if known is not None and _look(known) == _look(like):
        return known
    return torch.empty_like(like, requires_grad=False)


def _look(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.device, tensor.shape, tensor.stride()
