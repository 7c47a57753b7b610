"""The cases of the benchmarks: an optimizer, the tensors that it updates, and clipping or scaling.

A new class of fusedopt takes one entry in `OPTIMIZERS`; the rest of the tables follow from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, Literal, NamedTuple

import torch

Shapes = tuple[tuple[int, ...], ...]
Mode = Literal["plain", "clip", "amp", "norm"]


class Recipe(NamedTuple):
    """A class of torch.optim, and the arguments for every side. Our class is Fused<name>."""

    name: str
    options: dict[str, Any]


# By title. A title that isn't the name of a class is a variant of it, with more states or options.
OPTIMIZERS: dict[str, Recipe] = {
    "AdamW": Recipe("AdamW", {"lr": 1e-3, "weight_decay": 1e-2}),
    "Adam": Recipe("Adam", {"lr": 1e-3}),
    "RMSprop": Recipe("RMSprop", {"lr": 1e-3}),
    "RMSprop centered with momentum": Recipe(
        "RMSprop", {"lr": 1e-3, "momentum": 0.9, "centered": True}
    ),
    "NAdam": Recipe("NAdam", {"lr": 1e-3}),
    "SGD": Recipe("SGD", {"lr": 1e-3, "momentum": 0.9}),
    "SGD with Nesterov momentum": Recipe("SGD", {"lr": 1e-3, "momentum": 0.9, "nesterov": True}),
}

MODES: dict[Mode, str] = {
    "plain": "",
    "clip": "clipped",  # to a global norm of 1
    "amp": "scaler and clipped",  # unscale, clip, step or skip, update the scale
    "norm": "",  # no step: the global norm of the gradients
}


def gpt2_small() -> Shapes:
    """The parameters of GPT-2 with 124M (Radford et al., 2019), in the order of its modules."""
    width, vocabulary, context, layers = 768, 50257, 1024, 12
    norm = [(width,), (width,)]
    attention = [(width, 3 * width), (3 * width,), (width, width), (width,)]
    mlp = [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    block = [*norm, *attention, *norm, *mlp]
    return ((vocabulary, width), (context, width), *block * layers, *norm)


def resnet50() -> Shapes:
    """The parameters of ResNet-50 (He et al., 2015) for 1,000 classes, in the order of modules."""

    def conv(outputs: int, inputs: int, side: int) -> list[tuple[int, ...]]:
        return [(outputs, inputs, side, side), (outputs,), (outputs,)]  # with its batch norm

    shapes = conv(64, 3, 7)
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += conv(width, inputs, 1) + conv(width, width, 3) + conv(4 * width, width, 1)
            if block == 0:
                shapes += conv(4 * width, inputs, 1)
            inputs = 4 * width
    return (*shapes, (1000, inputs), (1000,))


def llama_1b() -> Shapes:
    """The parameters of TinyLlama with 1.1B (Zhang et al., 2024), in the order of its modules.

    32 heads share 4 of keys and values.
    """
    width, vocabulary, layers, hidden = 2048, 32000, 22, 5632
    keys = width * 4 // 32
    attention = [(width, width), (keys, width), (keys, width), (width, width)]
    mlp = [(hidden, width), (hidden, width), (width, hidden)]
    block = [*attention, *mlp, (width,), (width,)]
    return ((vocabulary, width), *block * layers, (width,), (vocabulary, width))


WORKLOADS: dict[str, Shapes] = {
    "one tensor of 25M": ((25_000_000,),),
    "GPT-2 small": gpt2_small(),
    "ResNet-50": resnet50(),
    "1,000 tensors of 64": ((64,),) * 1000,
    "300 tensors of 4,096": ((4096,),) * 300,
}


@dataclass(frozen=True)
class Case:
    """One step that every side takes.

    Attributes:
        optimizer: a title in `OPTIMIZERS`.
        workload: the tensors, in words.
        any_threads: whether to measure with every number of threads, not only the largest.
    """

    optimizer: str
    workload: str
    shapes: Shapes
    mode: Mode = "clip"
    dtype: torch.dtype = torch.float32
    any_threads: bool = False

    @property
    def recipe(self) -> Recipe:
        return OPTIMIZERS[self.optimizer]

    @property
    def elements(self) -> int:
        return sum(map(prod, self.shapes))

    @property
    def title(self) -> str:
        dtype = "" if self.dtype == torch.float32 else str(self.dtype).removeprefix("torch.")
        return ", ".join(filter(None, (self.optimizer, self.workload, dtype, MODES[self.mode])))

    def facts(self) -> dict[str, Any]:
        """The columns of a result that describe its case."""
        return {
            "case": self.title,
            "optimizer": self.optimizer,
            "workload": self.workload,
            "mode": self.mode,
            "dtype": str(self.dtype).removeprefix("torch."),
            "tensors": len(self.shapes),
            "elements": self.elements,
        }


def step_cases() -> list[Case]:
    large = "one tensor of 25M"
    cases = []
    for optimizer, recipe in OPTIMIZERS.items():
        if optimizer != recipe.name:
            # Only clipped: torch's foreach SGD with Nesterov momentum adds to the gradients in
            # place. All sides and steps share them: without clipping they would grow without end.
            cases.append(Case(optimizer, large, WORKLOADS[large]))
            continue
        if optimizer != "AdamW":  # the other cases would show the same as with AdamW
            cases.append(Case(optimizer, large, WORKLOADS[large], "plain"))
            for workload in (large, "ResNet-50", "1,000 tensors of 64"):
                cases.append(Case(optimizer, workload, WORKLOADS[workload]))
            continue
        for workload, shapes in WORKLOADS.items():
            both: tuple[Mode, ...] = ("plain", "clip")
            modes = (*both, "amp") if workload in (large, "ResNet-50") else both
            cases += [Case(optimizer, workload, shapes, it, any_threads=True) for it in modes]
        for mode in ("plain", "clip"):
            cases.append(
                Case(optimizer, large, WORKLOADS[large], mode, torch.bfloat16, any_threads=True)
            )
    return cases


def norm_cases() -> list[Case]:
    """The tensors whose gradients are measured."""
    large = "one tensor of 25M"
    cases = [
        Case("norm", name, shapes, "norm", any_threads=True) for name, shapes in WORKLOADS.items()
    ]
    return [*cases, Case("norm", large, WORKLOADS[large], "norm", torch.bfloat16, True)]


def format_cases() -> list[Case]:
    """Steps whose sides store weights and states in different formats."""
    # torchao leaves a tensor in 16 bits if its blocks of 256 elements don't divide it.
    large = ((25_000_000 // 256 * 256,),)
    return [Case("AdamW", "one tensor of 25M", large, mode) for mode in ("plain", "clip")]


def jax_cases() -> list[Case]:
    """Steps in programs of JAX."""
    workloads = {
        **{name: WORKLOADS[name] for name in ("one tensor of 25M", "1,000 tensors of 64")},
        "20 tensors of 250,000": ((250_000,),) * 20,
    }
    return [Case("AdamW", name, shapes) for name, shapes in workloads.items()]


def gpu_cases() -> list[Case]:
    """The cases for a GPU, the most important first: there may be no time for the last."""
    one, small = ((100_000_000,),), ((64,),) * 1000
    many, odd = ((100_000,),) * 1000, ((99_999,),) * 1000
    others = [title for title in OPTIMIZERS if title not in ("AdamW", "Adam")]
    return [
        *(Case("AdamW", "one tensor of 100M", one, mode) for mode in ("clip", "plain", "amp")),
        *(Case("AdamW", "1,000 tensors of 64", small, mode) for mode in ("clip", "plain")),
        *(Case("AdamW", name, WORKLOADS[name]) for name in ("ResNet-50", "GPT-2 small")),
        Case("AdamW", "Llama of 1.1B", llama_1b(), dtype=torch.bfloat16),
        Case("AdamW", "Llama of 1.1B", llama_1b()),
        Case("AdamW", "one tensor of 100M", one, dtype=torch.bfloat16),
        *(Case(it, "one tensor of 100M", one) for it in others),
        *(Case("AdamW", "1,000 tensors of 100,000", many, mode) for mode in ("clip", "plain")),
        *(Case("AdamW", "1,000 tensors of 99,999", odd, mode) for mode in ("clip", "plain")),
        Case("AdamW", "10,000 tensors of 1,024", ((1024,),) * 10_000),
        Case("Adam", "one tensor of 100M", one),
        Case("AdamW", "one tensor of 1G", ((10**9,),)),
    ]


def size_cases() -> list[Case]:
    """One tensor, from a thousand elements to a hundred million."""
    sizes = [10**k for k in range(3, 9)]
    return [Case("AdamW", f"one tensor of {size:,}", ((size,),)) for size in sizes]


def count_cases() -> list[Case]:
    """The same number of elements in more and more tensors, to see the cost per tensor."""
    total = 640_000
    counts = [10**k for k in range(5)]
    return [
        Case("AdamW", f"{total:,} elements in {count:,}", ((total // count,),) * count)
        for count in counts
    ]
