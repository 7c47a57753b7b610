"""Mutations of parameters, of gradients, and of any tensor's memory."""

from __future__ import annotations

import math
from typing import Any

import torch

import fusedopt
from fuzz.world import SHAPES, Subclass, is_sound, mutation


# --- parameters, and any tensor's memory
@mutation
def data_elsewhere(world, rng):
    param = world.param(rng)
    if is_sound(param):
        param.data = param.data.clone()


@mutation
def all_data_elsewhere(world, rng):
    for param in world.params:
        if is_sound(param):
            param.data = param.data.clone()


@mutation
def data_at_an_offset(world, rng):
    param = world.param(rng)
    if is_sound(param):
        flat = torch.zeros(param.numel() + 3, dtype=param.dtype)
        flat[3:] = param.detach().reshape(-1)
        param.data = flat[3:].view(param.shape)


@mutation
def data_with_gaps(world, rng):
    param = world.param(rng)
    if is_sound(param):
        param.data = torch.stack([param.data] * 2, -1)[..., rng.randrange(2)]


@mutation
def data_transposed(world, rng):
    param = world.param(rng)
    if is_sound(param) and param.dim() > 1:
        param.data = param.data.transpose(0, 1).contiguous().transpose(0, 1)


@mutation
def data_negative_in_memory(world, rng):
    param = world.param(rng)
    if is_sound(param) and param.is_floating_point():
        param.data = torch._neg_view(-param.data)


@mutation
def negative_view_of_the_same_memory(world, rng):
    tensor = world.tensor(rng)
    if tensor is not None and is_sound(tensor) and tensor.is_floating_point():
        tensor.data = torch._neg_view(tensor.data)


@mutation
def data_of_another_kind(world, rng):
    param = world.param(rng)
    if is_sound(param):
        kind = rng.choice([torch.float16, torch.int8, torch.complex64, torch.bool, torch.float32])
        if kind not in (torch.float16, torch.float32):
            world.comparable = False
        param.data = param.data.to(kind)


@mutation
def data_on_meta(world, rng):
    param = world.param(rng)
    param.data = torch.empty(tuple(param.shape), device="meta")


@mutation
def data_of_another_shape(world, rng):
    world.param(rng).data = torch.ones(rng.choice(SHAPES), dtype=world.dtype)


@mutation
def storage_cut(world, rng):
    tensor = world.tensor(rng)
    if tensor is not None and tensor.layout == torch.strided and tensor.device.type == "cpu":
        tensor.untyped_storage().resize_(rng.choice([0, 1, 2, 4, 8]))


@mutation
def storage_grown(world, rng):
    tensor = world.tensor(rng)
    if tensor is not None and tensor.layout == torch.strided and tensor.device.type == "cpu":
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        storage.resize_(size + 64)
        # What resize_ adds is not initialized: both worlds would hold different numbers.
        torch.empty(0, dtype=torch.uint8).set_(storage)[size:] = 0


@mutation
def shape_changed_in_place(world, rng):
    tensor = world.tensor(rng)
    if tensor is not None and is_sound(tensor):
        with torch.no_grad():
            change = rng.randrange(4)
            if change == 0 and tensor.dim() == 2:
                tensor.t_()
            elif change == 1:
                tensor.unsqueeze_(0)
            elif change == 2:
                tensor.squeeze_()
            else:
                tensor.detach().resize_(rng.choice(SHAPES))


@mutation
def memory_of_another(world, rng):
    one, other = world.tensor(rng), world.tensor(rng)
    if one is not None and other is not None and is_sound(one) and is_sound(other):
        world.comparable = False
        if one.dtype == other.dtype and one.numel() <= other.numel() and other.is_contiguous():
            start = rng.randint(0, other.numel() - one.numel())
            one.data = other.detach().reshape(-1)[start : start + one.numel()].view(one.shape)


@mutation
def set_to_the_storage_of_another(world, rng):
    one, other = world.tensor(rng), world.tensor(rng)
    if one is not None and other is not None and is_sound(one) and is_sound(other):
        world.comparable = False
        with torch.no_grad():
            one.detach().set_(other.detach())


@mutation
def swapped_with_another(world, rng):
    a, b = rng.randrange(len(world.params)), rng.randrange(len(world.params))
    if a != b:
        torch.utils.swap_tensors(world.params[a], world.params[b])


@mutation
def lazily_cloned(world, rng):
    tensor = world.tensor(rng)
    if tensor is not None and is_sound(tensor) and tensor.numel() > 0 and not tensor.is_neg():
        value = tensor.detach().clone()
        world.kept.append((torch._lazy_clone(tensor.detach()), value))


@mutation
def frozen(world, rng):
    param = world.param(rng)
    if param.is_floating_point():
        param.requires_grad_(rng.random() < 0.5)


# --- gradients
def set_grad(param, grad):
    param.grad = None
    param.grad_dtype = None
    param.grad = grad


@mutation
def no_gradient(world, rng):
    world.param(rng).grad = None


@mutation
def large_gradient(world, rng):
    param = world.param(rng)
    if is_sound(param) and param.is_floating_point():
        value = rng.choice([3e38, 1e30, 1e-30, math.inf, math.nan, 0.0, -0.0])
        param.grad = torch.full_like(param, value, requires_grad=False)


@mutation
def gradient_of_another_layout(world, rng):
    param = world.param(rng)
    if is_sound(param):
        grad = torch.ones_like(param, requires_grad=False)
        how = rng.randrange(4)
        if how == 0:
            grad = torch.stack([grad] * 2, -1)[..., 0]
        elif how == 1 and grad.dim() > 1:
            grad = grad.transpose(0, 1).contiguous().transpose(0, 1)
        elif how == 2 and grad.dim() > 0:
            grad = grad[:1].clone().expand_as(grad) if grad.shape[0] > 0 else grad
        else:
            grad = torch._neg_view(grad)
        set_grad(param, grad)


@mutation
def gradient_of_another_kind(world, rng):
    param = world.param(rng)
    shape = tuple(param.shape)
    kind = rng.randrange(6)
    if kind == 0:
        grad: Any = torch.ones(shape, dtype=rng.choice([torch.int32, torch.complex64, torch.half]))
    elif kind == 1:
        grad = torch.ones(shape, dtype=torch.float64)
    elif kind == 2:
        grad = torch.ones(shape, dtype=world.dtype).to_sparse() if shape else None
    elif kind == 3:
        grad = torch.ones(shape, dtype=world.dtype).as_subclass(Subclass)
    elif kind == 4:
        grad = torch.empty(shape, dtype=world.dtype, device="meta")
    else:
        grad = torch._efficientzerotensor(shape, dtype=world.dtype)
        world.comparable = False  # torch calculates with it by other rules
    set_grad(param, grad)


@mutation
def gradient_changed_by_its_data(world, rng):
    grad = world.param(rng).grad
    if grad is not None:
        grad.data = torch.ones(rng.choice(SHAPES), dtype=world.dtype)


@mutation
def gradient_that_is_the_parameter(world, rng):
    param = world.param(rng)
    set_grad(param, param.detach())
    # Where the reference looks at gradients after the update, too.
    if isinstance(world.optimizer.max_grad_norm, fusedopt.clip.AdaptiveClip):
        world.comparable = False


@mutation
def gradient_in_other_memory_that_is_written(world, rng):
    world.comparable = False
    param, other = world.param(rng), world.tensor(rng)
    if other is not None and is_sound(other) and other.dtype == param.dtype:
        flat = other.detach().reshape(-1)
        if flat.numel() >= param.numel():
            set_grad(param, flat[: param.numel()].view(param.shape))


@mutation
def gradient_of_two_parameters(world, rng):
    grads = {tuple(p.shape): p.grad for p in world.params if p.grad is not None}
    param = world.param(rng)
    grad = grads.get(tuple(param.shape))
    if grad is not None and grad.dtype == param.dtype:
        param.grad = grad
