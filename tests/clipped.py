"""Gradients to clip, for tests of clipping by itself."""

from __future__ import annotations

import math

import torch
from cases import DTYPES, make_params, set_grads
from torch.nn import Parameter

import fusedopt

FUSED_NORM_TYPES = [2.0, math.inf]
NORM_TYPES = [*FUSED_NORM_TYPES, 1.0, 3.0, 0.5, 0.0, -1.0, -math.inf, 1, "inf"]
NOT_EMPTY = [(3,), (), (555,), (16385,), (2, 33, 41)]


def grads_of(params):
    return [p.grad for p in params if p.grad is not None]


def by_name(params):
    return {f"grad {i}": p.grad for i, p in enumerate(params) if p.grad is not None}


def named(backend):
    return "cpu" if backend.name == "cpu" else "cuda"


def clip(backend, params, *args, **kwargs):
    return fusedopt.clip_grad_norm_(params, *args, backend=named(backend), **kwargs)


def with_grads(shapes, dtype=torch.float32, device="cpu", scale=1.0, seed=0):
    params = make_params(shapes, dtype, device)
    set_grads(params, seed, scale)
    return params


def with_grad(values, dtype=torch.float32, device="cpu"):
    param = Parameter(torch.zeros(len(values), dtype=dtype, device=device))
    param.grad = torch.tensor(values, dtype=dtype, device=device)
    return param


def in_float64(params):
    """The same, each on its own memory."""
    twins = [Parameter(param.detach().to(torch.float64, copy=True)) for param in params]
    for twin, param in zip(twins, params):
        twin.grad = None if param.grad is None else param.grad.to(torch.float64, copy=True)
    return twins


def mixed(device, scale=1.0):
    return [
        param
        for seed, dtype in enumerate(DTYPES)
        for param in with_grads([(33,), (), (20000,), (5, 7)], dtype, device, scale, seed)
    ]


def norm64(params):
    return math.sqrt(sum(g.double().square().sum().item() for g in grads_of(params)))
