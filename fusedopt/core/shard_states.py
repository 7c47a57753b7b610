"""ZeRO-1: each rank of a DDP group keeps the states of its share of the parameters."""

from __future__ import annotations

import zlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fusedopt.core import backends, sharding
from fusedopt.core.checkpoint import SHARE
from fusedopt.core.optimizer import FusedOptimizer, check_optimizer
from fusedopt.distributed import PeerError, Ranks, Share, is_dtensor
from fusedopt.reference import distinct_params
from fusedopt.reference.groups import name_of


def shard_states(optimizer: FusedOptimizer, group: Any = None) -> FusedOptimizer:
    """Deals the states of an optimizer over the ranks of a DDP group, known as ZeRO-1.

    Each rank keeps the states of its share, about 1/N of their bytes, and updates only that. After
    a step it gets the other parameters by broadcasts. Parameters, norm, clipping, skips and the
    telemetry of steps have the same bits as without it; the telemetry of single parameters is that
    of this rank's share. Whole parameters are dealt, by their bytes: the largest goes first, to
    the rank that has least.

    All ranks call it, with the same parameters in the same order. Add all param groups before.
    States that exist already are kept by their rank and dropped by the others. `state_dict()` has
    this rank's states; see `consolidated_state_dict`.

    Args:
        optimizer: over plain parameters that all ranks have alike, as DDP leaves them.
        group: the ProcessGroup of DDP. None: all ranks.

    Returns:
        The same optimizer.

    Raises:
        TypeError: the optimizer is another library's, or a parameter is a DTensor.
        ValueError: it has `process_group=` or `plain="own"`, a parameter needs no gradient, has no
            memory, or is a part of FullyShardedDataParallel's, the ranks have different
            parameters, or this one is not in the group.
        RuntimeError: it is sharded already, or no process group has been made.
        PeerError: another rank refused. In all cases nothing has been changed.
    """
    group = _checked_group(group)
    _check_on_all_ranks(optimizer, Ranks(group, "own"))
    with optimizer._lock:
        params = [param for _, param in distinct_params(optimizer.param_groups)]
        share = Share(params, group)
        away = [param for param in params if not share.keeps(param)]
        for param in away:
            optimizer.state.pop(param, None)
        optimizer._provisional_state.drop(away, optimizer.state)
        optimizer._own |= {
            "share": share,
            "plan": None,
            "together": None,
            "view": backends.new_view(),
        }
    return optimizer


def consolidated_state_dict(optimizer: FusedOptimizer, to: int = 0) -> dict[str, Any]:
    """The `state_dict()` that an optimizer would have whose states are not sharded, on one rank.

    It loads into optimizers with and without `shard_states`, on any number of ranks, and into
    torch's class. All ranks of the group call it.

    Args:
        optimizer: one that `shard_states` was called for, or any other: that has all its states.
        to: the rank in the group that gets it.

    Returns:
        On that rank, the whole of it, with tensors on the CPU. An empty dict on the others.

    Raises:
        TypeError: the optimizer is another library's.
        ValueError: there is no such rank in the group.
    """
    check_optimizer("consolidated_state_dict", optimizer)
    share: Share | None = optimizer._own["share"]
    state_dict = _on_cpu(optimizer.state_dict())
    if share is None:
        return state_dict
    if not 0 <= to < share.size:
        raise ValueError(f"Invalid to: {to}; expected a rank of the group, 0 to {share.size - 1}")
    states = share.collect(state_dict["state"], to)
    if states is None:
        return {}
    state_dict.pop(SHARE, None)
    merged = {key: it for part in states for key, it in part.items()}
    ids = [key for key in merged if isinstance(key, int)]
    others = {key: it for key, it in merged.items() if not isinstance(key, int)}
    return {**state_dict, "state": {**{key: merged[key] for key in sorted(ids)}, **others}}


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    return value


def _checked_group(group: Any) -> Any:
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "shard_states needs the ranks of a process group; expected "
            "torch.distributed.init_process_group() before it"
        )
    group = dist.group.WORLD if group is None else group
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            f"shard_states was given {group!r} as group; expected the ProcessGroup of DDP that "
            "this rank is in, or None"
        )
    return group


def _check_on_all_ranks(optimizer: FusedOptimizer, ranks: Ranks) -> None:
    """Refuses on all ranks what one of them refuses, and lists that differ."""
    error, listed = None, []
    try:
        _check(optimizer)
        listed = _listed(optimizer)
    except (TypeError, ValueError, RuntimeError) as refusal:
        error = refusal
    digest = zlib.crc32(repr(listed).encode())
    told = ranks.gather((digest, None if error is None else f"{type(error).__name__}: {error}"))
    if error is not None:
        raise error
    refused = [(rank, it) for rank, (_, it) in told if it is not None]
    if refused:
        words = "; ".join(f"rank {rank} refused shard_states: {it}" for rank, it in refused)
        raise PeerError(f"{words}. Nothing has been changed here", [rank for rank, _ in refused])
    if len({it for _, (it, _) in told}) > 1:
        _refuse_lists(ranks.gather(listed))


def _check(optimizer: Any) -> None:
    check_optimizer("shard_states", optimizer)
    own, groups = optimizer._own, optimizer.param_groups
    if own["share"] is not None:
        raise RuntimeError("shard_states was called twice for this optimizer; expected once")
    if own["process_group"] is not None or own["plain"] == "own":
        raise ValueError(
            f"shard_states was given an optimizer with process_group={own['process_group']} and "
            f"plain={own['plain']!r}; expected one without them: group= names the ranks"
        )
    for g, its in enumerate(groups):
        for i, param in enumerate(its["params"]):
            _check_param(param, name_of(groups, g, i))


def _check_param(param: Tensor, name: str) -> None:
    expected = "expected plain parameters that all ranks have alike, as DDP leaves them"
    if is_dtensor(param):
        raise TypeError(f"{name} is a DTensor, whose state is sharded as it is; {expected}")
    if sharding.is_flat_part(param):
        raise ValueError(f"{name} is a part of FullyShardedDataParallel's; {expected}")
    if torch.nn.parameter.is_lazy(param) or param.is_meta:
        raise ValueError(f"{name} has no memory yet; expected parameters with their values")
    if not param.requires_grad:
        raise ValueError(
            f"{name} requires no gradient, so that no rank should have a share in it; expected "
            "only parameters that are trained: leave it out of the optimizer"
        )


def _listed(optimizer: FusedOptimizer) -> list[tuple[str, ...]]:
    """What all ranks must have alike, in words: the class, and every parameter."""
    optimizer._follow_names()
    groups = optimizer.param_groups
    return [
        (type(optimizer).__name__, f"{len(groups)} param groups"),
        *(
            (name_of(groups, g, i), f"{tuple(param.shape)} {param.dtype}")
            for g, its in enumerate(groups)
            for i, param in enumerate(its["params"])
        ),
    ]


def _refuse_lists(told: list[tuple[int, list[tuple[str, ...]]]]) -> None:
    """Names the first thing that differs."""
    length = max(len(its) for _, its in told)
    end = ("no parameter",)
    for index in range(length):
        found = {rank: its[index] if index < len(its) else end for rank, its in told}
        if len(set(found.values())) > 1:
            words = "; ".join(f"rank {rank} has {', '.join(it)}" for rank, it in found.items())
            raise ValueError(
                f"the ranks called shard_states with different parameters: {words}; expected the "
                "same on all, in the same order. Nothing has been changed"
            )
