"""The optimizer that is mutated, with its parameters, and the list of all mutations."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

import fusedopt

SHAPES = [(5,), (3, 4), (), (33,), (0,), (4, 1), (2, 3, 4)]
MATRICES = [(3, 4), (4, 1), (4, 3), (5, 5), (0, 4)]
CLASSES: list[tuple[type, dict[str, Any]]] = [
    (fusedopt.FusedAdam, {}),
    (fusedopt.FusedAdamW, {"amsgrad": True}),
    (fusedopt.FusedNAdam, {}),
    (fusedopt.FusedAdadelta, {}),
    (fusedopt.FusedAdamax, {}),
    (fusedopt.FusedAdagrad, {}),
    (fusedopt.FusedASGD, {"t0": 1.0}),
    (fusedopt.FusedRprop, {}),
    (fusedopt.FusedLAMB, {}),
    (fusedopt.FusedLARS, {"momentum": 0.9, "weight_decay": 0.1}),
    (fusedopt.FusedStableAdamW, {}),
    (fusedopt.FusedLion, {}),
    (fusedopt.FusedLion, {"cautious": True}),
    (fusedopt.FusedAdamW, {"cautious": True}),
    (fusedopt.FusedAdEMAMix, {}),
    (fusedopt.FusedRAdam, {}),
    (fusedopt.FusedSGD, {"momentum": 0.9}),
    (fusedopt.FusedSGD, {}),
    (fusedopt.FusedRMSprop, {"momentum": 0.9, "centered": True}),
    (fusedopt.FusedMuon, {}),
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
        cls, kwargs = rng.choice(CLASSES)
        shapes = rng.sample(MATRICES if cls is fusedopt.FusedMuon else SHAPES, rng.randint(1, 5))
        self.dtype = rng.choice([torch.float32] * 3 + [torch.float64, torch.bfloat16])
        self.params: list[Any] = [
            Parameter(torch.randn(shape, generator=generator).to(self.dtype)) for shape in shapes
        ]
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
