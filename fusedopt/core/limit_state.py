"""The state of an adaptive limit in a checkpoint.

It is in the first param group, as torch's distributed checkpoints drop everything outside of the
groups. torch's classes keep and ignore unknown keys of a group.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fusedopt.reference import Group, distinct_params
from fusedopt.reference.groups import own_name
from fusedopt.reference.limits import AdaptiveClip

KEY = "max_grad_norm_state"


@torch.inference_mode(False)
def save(
    limit: AdaptiveClip, state: Tensor | None, before: list[Tensor] | None, groups: list[Group]
) -> dict[str, Any] | None:
    """The limit's entry in the first param group. None if this limit learns nothing.

    Args:
        state: the limit's state, or None before the first step.
        before: the parameters in the order of that state.
    """
    params = [param for _, param in distinct_params(groups)]
    count = sum(len(group["params"]) for group in groups)
    device = next((p.device for p in params if not p.is_meta), torch.device("cpu"))
    if state is not None and before is not None:
        state = limit.reorder(state, before, params)
    state = limit.resize(state, count, device)
    if state.numel() == 0:
        return None
    names = _names(groups)
    saved: dict[str, Any] = {"limit": limit.label(), "state": state}
    return saved if None in names else {**saved, "param_names": names}


@torch.inference_mode(False)
def load(limit: object, saved: Any, groups: list[Group], listed: list[Tensor]) -> Tensor | None:
    """The state of this limit from a checkpoint. None if the checkpoint has none.

    The state of another limit is dropped, with a warning.

    Args:
        saved: the result of `save`, or None.
        groups: the param groups that the checkpoint is loaded into.
        listed: their parameters in the order of the checkpoint.
    """
    if saved is None:
        return None
    if not isinstance(saved, Mapping) or not saved.keys() >= {"limit", "state"}:
        raise ValueError(
            f"loaded state dict has {saved!r} as {KEY!r}; expected 'limit' and 'state'"
        )
    if not isinstance(limit, AdaptiveClip) or saved["limit"] != limit.label():
        _warn_of_loss(limit, saved)
        return None
    state, count = saved["state"], sum(len(group["params"]) for group in groups)
    _check(limit, state, count)
    state = state.detach().clone(memory_format=torch.contiguous_format)
    params = [param for _, param in distinct_params(groups)]
    by_name = dict(zip(_names(groups), params, strict=True))
    names = list(saved.get("param_names", ()))
    if None not in by_name and by_name.keys() == set(names) and len(names) == len(params):
        listed = [by_name[name] for name in names]
    return limit.resize(limit.reorder(state, listed, params), count, state.device)


def _names(groups: list[Group]) -> list[Any]:
    """The name of every parameter, once each and in order."""
    names: dict[int, Any] = {}
    for group in groups:
        for i, param in enumerate(group["params"]):
            names.setdefault(id(param), own_name(group, i))
    return list(names.values())


def _check(limit: AdaptiveClip, state: Any, count: int) -> None:
    expected = limit.new_state(count, torch.device("cpu"))
    if (
        not isinstance(state, Tensor)
        or state.shape != expected.shape
        or state.dtype != expected.dtype
    ):
        raise ValueError(
            f"loaded state dict has {state!r} as the state of {limit}; expected a float64 tensor "
            f"of shape {tuple(expected.shape)}"
        )
    counts = state[..., :1]  # kernels use it to find a norm's place in the window
    if state.isnan().any() or not ((counts >= 0) & (counts <= 2**53) & (counts % 1 == 0)).all():
        raise ValueError(
            f"loaded state dict has {state!r} as the state of {limit}; expected whole numbers of "
            "steps, and no nan"
        )


def _warn_of_loss(limit: object, saved: Mapping[str, Any]) -> None:
    state = saved["state"]
    if isinstance(state, Tensor) and not state.any():
        return  # no step has used it
    warnings.warn(
        f"the checkpoint has what {saved['limit']} has learned, and max_grad_norm is {limit} here: "
        "it is dropped, as only exactly the same limit goes on with it. Set max_grad_norm to that "
        "limit before load_state_dict() to keep it",
        RuntimeWarning,
        stacklevel=2,
    )
