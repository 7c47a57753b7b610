"""Changes whatever Python code can change between steps, at random, and steps.

    python tests/fuzz_step.py [--mutations 1000000] [--seed 0] [--trace] [--emulated VARIANT]

A step either gives the reference's bits, or raises an error that Python code can catch and has
changed nothing. Nothing crashes the interpreter.
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import math
import random
import re
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import same_bits
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

import fusedopt
from fusedopt.core import backends

SHAPES = [(5,), (3, 4), (), (33,), (0,), (4, 1), (2, 3, 4)]
CLASSES: list[tuple[type, dict[str, Any]]] = [
    (fusedopt.FusedAdam, {}),
    (fusedopt.FusedAdamW, {"amsgrad": True}),
    (fusedopt.FusedNAdam, {}),
    (fusedopt.FusedAdadelta, {}),
    (fusedopt.FusedAdamax, {}),
    (fusedopt.FusedRAdam, {}),
    (fusedopt.FusedSGD, {"momentum": 0.9}),
    (fusedopt.FusedSGD, {}),
    (fusedopt.FusedRMSprop, {"momentum": 0.9, "centered": True}),
]
MUTATIONS: list[Callable[[World, random.Random], Any]] = []


def mutation(function: Callable[[World, random.Random], Any]) -> Callable:
    MUTATIONS.append(function)
    return function


class Subclass(Tensor):
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError("a subclass's own operation")


class World:
    """An optimizer with its parameters, and what was done to them."""

    def __init__(self, backend: str | None, seed: int) -> None:
        rng = random.Random(seed)
        generator = torch.Generator().manual_seed(seed)
        self.seed = seed
        shapes = rng.sample(SHAPES, rng.randint(1, 5))
        self.dtype = rng.choice([torch.float32] * 3 + [torch.float64, torch.bfloat16])
        self.params: list[Any] = [
            Parameter(torch.randn(shape, generator=generator).to(self.dtype)) for shape in shapes
        ]
        cls, kwargs = rng.choice(CLASSES)
        half = len(self.params) // 2
        groups: list[dict[str, Any]] = [
            {"params": self.params[:half]},
            {"params": self.params[half:]},
        ]
        self.optimizer = cls(
            groups,
            lr=0.1,
            max_grad_norm=rng.choice([None, 1.0, fusedopt.clip.PerTensor(warmup=1)]),
            telemetry=rng.choice([None, 3]),
            backend=backend,
            **kwargs,
        )
        self.grads = random.Random(seed)
        self.mode: Any = nullcontext()
        self.comparable = True  # with the reference, to the bit
        self.kept: list[Any] = []  # so that nothing ends too early: (tensor, its value) or others

    def param(self, rng: random.Random) -> Tensor:
        return rng.choice(self.params)

    def state(self, rng: random.Random) -> dict[str, Any]:
        found = self.optimizer.state.get(self.param(rng))
        return found if isinstance(found, dict) else {}

    def item(self, rng: random.Random) -> tuple[dict[str, Any], str] | tuple[None, None]:
        state = self.state(rng)
        return (state, rng.choice(sorted(map(str, state)))) if state else (None, None)

    def group(self, rng: random.Random) -> Any:
        return rng.choice(list(self.optimizer.param_groups))

    def tensor(self, rng: random.Random) -> Tensor | None:
        """A parameter, a gradient or a state."""
        kind = rng.randrange(3)
        if kind == 0:
            return self.param(rng)
        if kind == 1:
            return self.param(rng).grad
        state, key = self.item(rng)
        value = None if state is None else state.get(key)
        return value if isinstance(value, Tensor) else None

    def new_grads(self) -> None:
        for param in self.params:
            if self.grads.random() < 0.8:
                generator = torch.Generator().manual_seed(self.grads.randrange(2**31))
                grad = torch.randn(tuple(param.shape), generator=generator)
                with suppress(RuntimeError, TypeError):
                    param.grad = grad.to(param.dtype)


def memory_of(tensor: Tensor) -> Tensor | None:
    """The bytes of its storage, whatever the tensor itself says."""
    try:
        storage = tensor.untyped_storage()
        if storage.device.type != "cpu" or storage.nbytes() == 0 or storage.data_ptr() == 0:
            return None
        return torch.empty(0, dtype=torch.uint8).set_(storage).clone()
    except (RuntimeError, NotImplementedError):
        return None


def tensors_of(world: World) -> list[Tensor]:
    found = [param for param in world.params if isinstance(param, Tensor)]
    for state in list(world.optimizer.state.values()):
        if isinstance(state, dict):
            found += [value for value in state.values() if isinstance(value, Tensor)]
    return found


def is_sound(tensor: Tensor) -> bool:
    """Whether it may be read at all: torch itself crashes where a storage was cut."""
    if type(tensor) not in (Tensor, Parameter) or tensor.layout != torch.strided:
        return False
    if tensor.device.type != "cpu" or tensor.is_complex():
        return False
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    end = (tensor.storage_offset() + last + 1) * tensor.element_size()
    return tensor.numel() == 0 or tensor.untyped_storage().nbytes() >= end


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


# --- state
@mutation
def item_deleted(world, rng):
    state, key = world.item(rng)
    if state is not None:
        state.pop(key, None)


@mutation
def item_replaced(world, rng):
    state, key = world.item(rng)
    if state is None or not isinstance(state.get(key), Tensor) or not is_sound(state[key]):
        return
    value = state[key]
    kind = rng.randrange(9)
    state[key] = (
        value.clone() if kind < 3 else
        value.to(rng.choice([torch.float64, torch.int32, torch.float32])) if kind == 3 else
        torch.empty(tuple(value.shape), device="meta") if kind == 4 else
        torch.ones(rng.choice(SHAPES)) if kind == 5 else
        value.reshape(-1)[:1].expand(value.numel()).reshape(value.shape) if kind == 6 else
        value.clone().as_subclass(Subclass) if kind == 7 else
        torch._neg_view(-value)
    )  # fmt: skip


@mutation
def item_of_another_type(world, rng):
    state, key = world.item(rng)
    if state is not None:
        state[key] = rng.choice([None, 3, 2.0, "x", [1.0], {}, object(), True, np.float32(2)])


@mutation
def step_count_changed(world, rng):
    state = world.state(rng)
    if isinstance(state.get("step"), Tensor) and is_sound(state["step"]):
        value = rng.choice([-2.5, -1.0, 0.0, 7.0, 0.5, math.nan, math.inf, 1e30, 2.0**24])
        if value != int(value) if math.isfinite(value) else True:
            world.comparable = False
        if value < 0 or value > 2**24:
            world.comparable = False
        if rng.random() < 0.5:
            state["step"] = torch.tensor(value)
        else:
            state["step"].fill_(value)
            world.comparable = False


@mutation
def user_item(world, rng):
    state = world.state(rng)
    state[rng.choice(["mine", 7, (1, 2), "step "])] = rng.choice([torch.ones(2), 3])


@mutation
def state_changed(world, rng):
    param = world.param(rng)
    optimizer = world.optimizer
    kind = rng.randrange(8)
    if kind == 0:
        optimizer.state.pop(param, None)
    elif kind == 1:
        optimizer.state.clear()
    elif kind == 2:
        optimizer.state = collections.UserDict(optimizer.state)
    elif kind == 3 and isinstance(optimizer.state.get(param), dict):
        optimizer.state[param] = collections.OrderedDict(optimizer.state[param])
    elif kind == 4:
        optimizer.state["mine"] = rng.choice([1, None, [2], {}])
    elif kind == 5:
        optimizer.state[param] = rng.choice([1, None, [2], {}, collections.UserDict()])
    elif kind == 6 and param in optimizer.state:
        optimizer.state[param] = optimizer.state.pop(param)
    elif kind == 7:
        optimizer.state = dict(optimizer.state)


# --- groups
class Shrinks:
    """A number that changes the group's lists while it is read."""

    def __init__(self, world, target):
        self.world, self.target = world, target

    def __float__(self):
        self.target.clear()
        return 0.5


class Fails:
    def __float__(self):
        raise ZeroDivisionError("of its own")


class Recurses:
    def __init__(self, world):
        self.world = world

    def __float__(self):
        self.world.optimizer.step()
        return 0.5


@mutation
def number_changed(world, rng):
    key = rng.choice(["lr", "weight_decay", "eps", "momentum", "maximize", "amsgrad"])
    group = world.group(rng)
    if key in group:
        shrinks = rng.random() < 0.1
        world.comparable = world.comparable and not shrinks
        group[key] = rng.choice(
            [0, 0.1, 0.5, True, np.float64(0.3), Fraction(1, 3), torch.tensor(0.2), "0.1", None,
             [0.1], torch.ones(2), torch.tensor(0.1, device="meta"), np.array([0.1, 0.2]), {}, 1j,
             10**400, Fails(), b"1"] if not shrinks else [Shrinks(world, group)]
        )  # fmt: skip


@mutation
def harsh_number(world, rng):
    world.comparable = False
    key = rng.choice(["lr", "weight_decay", "eps", "momentum"])
    if key in world.group(rng):
        world.group(rng)[key] = rng.choice([-1, math.nan, math.inf, 1e300, -0.0])


@mutation
def pair_changed(world, rng):
    group = world.group(rng)
    if "betas" in group:
        numbers: list[Any] = [0.5, 0.25]
        kind = rng.randrange(12)
        group["betas"] = (
            numbers if kind == 0 else
            collections.deque(numbers) if kind == 1 else
            np.array(numbers) if kind == 2 else
            torch.tensor(numbers) if kind == 3 else
            (x for x in numbers) if kind == 4 else
            set(numbers) if kind == 5 else
            dict(enumerate(numbers)) if kind == 6 else
            "ab" if kind == 7 else
            [*numbers, 0.1] if kind == 8 else
            collections.UserList(numbers) if kind == 9 else
            [0.5, None] if kind == 10 else
            0.5
        )  # fmt: skip


@mutation
def pair_that_shrinks(world, rng):
    group = world.group(rng)
    if "betas" in group:
        world.comparable = False  # how often a number is read is nobody's business
        numbers: list[Any] = [0.5, 0.5]
        numbers[rng.randrange(2)] = Shrinks(
            world, rng.choice([numbers, world.optimizer.param_groups])
        )
        group["betas"] = numbers


@mutation
def step_within_a_step(world, rng):
    world.comparable = False
    world.group(rng)["lr"] = Recurses(world)


@mutation
def list_of_another_type(world, rng):
    group = world.group(rng)
    params = group.get("params")
    if isinstance(params, list) and all(isinstance(p, Parameter) for p in params):
        kind = rng.randrange(9)
        group["params"] = (
            tuple(params) if kind == 0 else
            collections.deque(params) if kind == 1 else
            torch.nn.ParameterList(params) if kind == 2 else
            dict.fromkeys(params).keys() if kind == 3 else
            iter(params) if kind == 4 else
            (None if kind == 5 else "params" if kind == 6 else torch.ones(3)) if kind < 8 else
            [*params, 3]
        )  # fmt: skip


@mutation
def parameter_listed_again_or_dropped(world, rng):
    params = world.group(rng).get("params")
    if isinstance(params, list):
        kind = rng.randrange(4)
        if kind == 0:
            params.append(world.param(rng))
        elif kind == 1 and params:
            params.pop()
        elif kind == 2:
            params.reverse()
        else:
            fresh = Parameter(torch.ones(rng.choice(SHAPES), dtype=world.dtype))
            world.params.append(fresh)
            params.append(fresh)


@mutation
def groups_of_another_type(world, rng):
    optimizer = world.optimizer
    kind = rng.randrange(6)
    groups = list(optimizer.param_groups)
    if kind == 0:
        optimizer.param_groups = tuple(groups)
    elif kind == 1:
        optimizer.param_groups = collections.UserList(groups)
    elif kind == 2:
        optimizer.param_groups = [collections.UserDict(group) for group in groups]
    elif kind == 3:
        optimizer.param_groups = [collections.OrderedDict(group) for group in groups]
    elif kind == 4 and isinstance(groups[0], dict):
        groups[0].pop(rng.choice(sorted(groups[0])))
    else:
        optimizer.param_groups = rng.choice([[], [None], None, 3, [3]])


@mutation
def settings_changed(world, rng):
    limits = [None, 1.0, 1e-3, math.inf, fusedopt.clip.ZScore(warmup=1), fusedopt.clip.PerTensor()]
    world.optimizer.max_grad_norm = rng.choice(limits)
    world.optimizer.nonfinite = rng.choice([None, "skip", "raise", "propagate"])


@mutation
def scaler_tensors(world, rng):
    values = [None, torch.tensor(2.0), torch.ones(0), torch.ones(2), torch.ones((), device="meta")]
    cut = torch.tensor(1.0)
    cut.untyped_storage().resize_(0)
    world.optimizer.grad_scale = rng.choice([*values, cut])
    world.optimizer.found_inf = rng.choice([None, torch.tensor(0.0), torch.tensor(1.0), cut])


# --- what is in force while a step runs
class EmptiesGroups(TorchDispatchMode):
    def __init__(self, world):
        super().__init__()
        self.world = world

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for group in self.world.optimizer.param_groups:
            if isinstance(group, dict) and isinstance(group.get("params"), list):
                group["params"].clear()
        self.world.optimizer.state.clear()
        return func(*args, **(kwargs or {}))


@mutation
def mode_in_force(world, rng):
    kind = rng.randrange(4)
    world.comparable = world.comparable and kind == 0
    if kind == 0:
        world.mode = torch.inference_mode()
    elif kind == 1:
        world.mode = EmptiesGroups(world)
    elif kind == 2:
        world.mode = torch.device("meta")
    else:
        from torch._subclasses.fake_tensor import FakeTensorMode

        world.mode = FakeTensorMode(allow_non_fake_inputs=True)


# --- clipping by itself
def clip(world: World, rng: random.Random) -> Any:
    backend = world.optimizer._backend
    params = [param for param in world.params if isinstance(param, Tensor)]
    max_norm = rng.choice([1.0, 1e-3, math.inf, 0.0])
    which = rng.randrange(3)
    if which == 0:
        norm = fusedopt.clip_grad_norm_(
            params, max_norm, rng.choice([2, math.inf, 1]), backend=backend
        )
    elif which == 1:
        grads = [param.grad for param in params if param.grad is not None]
        norm = fusedopt.get_total_norm(grads, rng.choice([2, math.inf]), backend=backend)
    else:
        total = rng.choice([2.0, torch.tensor(3.0), torch.tensor(3), torch.ones(0)])
        norm = fusedopt.clip_grads_with_norm_(params, max_norm, total, backend=backend)
    return norm


def attempt(function: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return function(), None
    except Exception as error:
        return None, error


class Failure(AssertionError):
    pass


def expect_unchanged(before, world, error) -> None:
    for tensor, memory in before:
        now = memory_of(tensor)
        if memory is not None and (now is None or not torch.equal(now, memory)):
            raise Failure(f"changed, though it raised {error!r}")


def expect_same(worlds: tuple[World, World]) -> None:
    fused, reference = (tensors_of(world) for world in worlds)
    for one, other in zip(fused, reference, strict=True):
        if not (is_sound(one) and is_sound(other)):
            continue
        if not same_bits(one.detach().resolve_neg(), other.detach().resolve_neg()):
            raise Failure(f"other bits than the reference's: {one} and {other}")


def may_refuse_alone(reference: World, error: Exception) -> bool:
    """Whether only the reference meets this error.

    It reads the options of groups that have no gradients, and lazy clones whose memory was resized,
    which torch itself can't read.
    """
    if isinstance(error, ValueError | ZeroDivisionError | OverflowError):  # of its arithmetic
        return True
    if found := re.match(r"param group (\d+)'s ", str(error)):
        group = list(reference.optimizer.param_groups)[int(found[1])]
        return all(param.grad is None for param in group["params"])
    return "COW.cpp" in str(error)


def run(worlds: tuple[World, World], function: Callable[[World], Any], acts: bool) -> bool:
    """Whether the worlds may go on."""
    fused, reference = worlds
    before = [(tensor, memory_of(tensor)) for tensor in tensors_of(fused)]
    changes_meanwhile = not isinstance(fused.mode, nullcontext)
    with fused.mode:
        result, error = attempt(lambda: function(fused))
    fused.mode = nullcontext()
    if error is not None:
        if "please report" in str(error) and "fusedopt" in str(error) and not changes_meanwhile:
            raise Failure(repr(error))
        if not changes_meanwhile:
            expect_unchanged(before, fused, error)
        return False
    for kept in fused.kept:
        if isinstance(kept, tuple) and not same_bits(*kept):
            raise Failure("a lazy clone was written to")
    if not fused.comparable:
        return False
    with reference.mode:
        expected, other = attempt(lambda: function(reference))
    reference.mode = nullcontext()
    if other is not None:
        if not may_refuse_alone(reference, other):
            raise Failure(f"only the reference raised {other!r}")
        return False
    if isinstance(result, Tensor) and not same_bits(result, expected):
        raise Failure(f"norm {result}; expected {expected}")
    expect_same(worlds)
    return True


def fuzz(mutations: int, seed: int, trace: bool, backend: str | None) -> collections.Counter:
    done: collections.Counter = collections.Counter()
    rng = random.Random(seed)
    while done["mutations"] < mutations:
        world_seed = rng.randrange(2**31)
        worlds = World(backend, world_seed), World("reference", world_seed)
        history = [f"world {world_seed}"]
        for _ in range(20):
            for world in worlds:
                world.new_grads()
            number = rng.choice([0, 1, 1, 2])
            for _ in range(number):
                change, change_seed = rng.choice(MUTATIONS), rng.randrange(2**31)
                history.append(f"{change.__name__}({change_seed})")
                if trace:
                    print(history[-1], flush=True)
                # A change itself may be refused by torch; then by both.
                for world in worlds:
                    attempt(lambda: change(world, random.Random(change_seed)))  # noqa: B023
                worlds[1].comparable = worlds[0].comparable
            clip_seed = rng.randrange(2**31) if rng.random() < 0.2 else None
            history.append("step" if clip_seed is None else f"clip({clip_seed})")
            if trace:
                print(history[-1], flush=True)
            done["mutations"] += number
            done["steps"] += 1
            try:
                if clip_seed is not None:
                    goes_on = run(worlds, lambda w: clip(w, random.Random(clip_seed)), False)  # noqa: B023
                else:
                    goes_on = run(worlds, lambda w: w.optimizer.step(), True)
            except Failure as failure:
                raise Failure(f"{failure}\nafter {', '.join(history)}") from failure
            if not goes_on:
                done["refused, or not comparable"] += 1
                break
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutations", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--trace", action="store_true", help="print every change before it is made")
    parser.add_argument("--emulated", metavar="VARIANT", help="the CUDA kernels, emulated")
    arguments = parser.parse_args()
    seed = random.randrange(2**31) if arguments.seed is None else arguments.seed
    print(f"seed {seed}", flush=True)
    faulthandler.enable()
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    backend = "cpu"
    if arguments.emulated:
        sys.path.insert(0, str(Path(__file__).parent / "emulator"))
        import build

        backends._C = build.load(arguments.emulated)
        backend = "cuda"
    print(dict(fuzz(arguments.mutations, seed, arguments.trace, backend)))


if __name__ == "__main__":
    main()
