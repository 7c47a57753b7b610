"""Parameters and gradients for tests over several ranks."""

from __future__ import annotations

from contextlib import contextmanager
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

SHAPES = [(5,), (3,), (7, 3), (), (200, 130)]


def tensors(seed):
    """A tensor of every shape, the same on all ranks."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def placed(tensor, mesh, placements):
    """A DTensor; what has no dimension is replicated."""
    wanted = [Replicate() if tensor.dim() == 0 else it for it in placements]
    return distribute_tensor(tensor, mesh, wanted, src_data_rank=None)


def sharded(mesh, placements):
    return [torch.nn.Parameter(placed(value, mesh, placements)) for value in tensors(0)]


def placed_like(param, value):
    """A value laid out as a parameter is."""
    is_sharded = isinstance(param, DTensor)
    return placed(value, param.device_mesh, param.placements) if is_sharded else value


def set_grads(params, seed, scale=1.0):
    for param, grad in zip(params, tensors(seed), strict=True):
        param.grad = placed_like(param, grad * scale)


def on_all(value):
    """What every rank has."""
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def same_on_all(value):
    return all(it == value or it != it for it in on_all(value))


def full(value):
    return value.full_tensor() if isinstance(value, DTensor) else value


@contextmanager
def counted_all_reduces():
    """A list that grows by an item for every all-reduce."""
    calls = []
    original = dist.all_reduce

    def counted(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    with mock.patch.object(dist, "all_reduce", counted):
        yield calls
