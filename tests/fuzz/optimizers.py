"""Mutations of states, groups and settings, and modes that are in force in a step."""

from __future__ import annotations

import collections
import math
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

import fusedopt
from fuzz.world import SHAPES, Subclass, is_sound, mutation


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
def iteration_changed(world, rng):
    group = world.group(rng)
    key = rng.choice(["ns_steps", "ns_coefficients", "adjust_lr_fn", "nesterov"])
    if key in group:
        group[key] = rng.choice(
            [0, 3, 100, -1, 2.0, None, "original", "match_rms_adamw", "x", (1.0, 2.0), True, False,
             (2.0, -1.5, 0.5), [2, Fraction(-3, 2), np.float32(0.5)], (1e300, 1.0, 1.0),
             torch.tensor([2.0, -1.5, 0.5]), {}, (1.0, None, 1.0), (math.nan, math.inf, 1.0)]
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
