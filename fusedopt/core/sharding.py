"""Optimizers that see only their rank's part of a model, as far as they can be recognized.

The norm of such a part is not the model's, and a rank that skips a step by itself leaves a model
of which one half was updated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedopt.core.callers import calling_module
from fusedopt.distributed import is_dtensor

# By module: who gives every rank's optimizer a part of the parameters.
_SHARDING_CALLERS = {
    "torch.distributed.optim.zero_redundancy_optimizer": "ZeroRedundancyOptimizer",
    "fairscale.optim.oss": "OSS",
}


def sharding_caller() -> str | None:
    """What to say of this optimizer, if it is being made for one rank's part of a model."""
    name = calling_module(_SHARDING_CALLERS)
    if name is None or not _several_ranks():
        return None
    return (
        f"{name} gives each rank its own parameters. Clip all of the model's gradients "
        "with fusedopt.clip_grad_norm_ before the step"  # it takes no process_group= for us
    )


def sharded_param(param: Tensor, name: str) -> str | None:
    """What to say of a flat parameter of `FullyShardedDataParallel`, or a view of one."""
    if not is_flat_part(param):
        return None
    return (
        f"{name} is a part of FullyShardedDataParallel's, and each rank has its own. Name the "
        "ranks that step together, process_group=, and give plain='own'"
    )


def is_flat_part(param: Tensor) -> bool:
    """Whether it is a flat parameter of `FullyShardedDataParallel`, or a view of one."""
    is_flat = getattr(param, "_is_flat_param", False) or getattr(param, "_fsdp_flattened", False)
    return is_flat and _several_ranks()


def is_part(param: Any) -> bool:
    """Whether other ranks have other elements of the same tensor."""
    if not is_dtensor(param):
        return is_flat_part(param)
    return any(
        not placement.is_replicate() and param.device_mesh.size(dim) > 1
        for dim, placement in enumerate(param.placements)
    )


def refuse(sharded: str | None, *asked: str) -> None:
    """Refuses to measure only one rank's part of a model for what is asked."""
    if sharded is not None and asked:
        raise RuntimeError(
            f"{' and '.join(asked)} can't be had: {sharded}. As it is, a rank would clip by its "
            "own norm and skip by itself, which leaves a half-updated model; expected that, or "
            "neither max_grad_norm nor nonfinite nor fusedopt.GradScaler, without which the update "
            "is right"
        )


def _several_ranks() -> bool:
    distributed = torch.distributed
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )
