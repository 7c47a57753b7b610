"""What is measured on a GPU: an optimizer, its tensors, what comes with the step, and the sides."""

from __future__ import annotations

import gc
import importlib
import inspect
import itertools
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

import torch
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_

import fusedopt

Step = Callable[[], object]
Shapes = tuple[tuple[int, ...], ...]
OURS = "fusedopt"
OUR_SCALER = "fusedopt with its scaler"
TORCH = ("torch fused", "torch foreach", "torch compiled")
OTHERS = ("apex", "deepspeed", "bitsandbytes", "flashoptim")


class Unavailable(Exception):
    """Why a side can't be measured."""


def llama_1b() -> Shapes:
    """1.2 billion parameters in the shapes of Llama (Touvron et al., 2023), embeddings tied."""
    width, inner, key_value, layers, vocabulary = 2048, 8192, 512, 16, 128256
    attention = [(width, width), (key_value, width), (key_value, width), (width, width)]
    mlp = [(inner, width), (inner, width), (width, inner)]
    layer = [*attention, *mlp, (width,), (width,)]
    return ((vocabulary, width), *layer * layers, (width,))


def gpt2_small() -> Shapes:
    """GPT-2 with 124 million parameters (Radford et al., 2019)."""
    width, vocabulary, context, layers = 768, 50257, 1024, 12
    norm = [(width,), (width,)]
    attention = [(width, 3 * width), (3 * width,), (width, width), (width,)]
    mlp = [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    layer = [*norm, *attention, *norm, *mlp]
    return ((vocabulary, width), (context, width), *layer * layers, *norm)


def resnet50() -> Shapes:
    """ResNet-50 (He et al., 2016) for 1,000 classes."""

    def conv(outputs: int, inputs: int, side: int) -> list[tuple[int, ...]]:
        return [(outputs, inputs, side, side), (outputs,), (outputs,)]  # with its batch norm

    shapes, inputs = conv(64, 3, 7), 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += conv(width, inputs, 1) + conv(width, width, 3) + conv(4 * width, width, 1)
            if block == 0:
                shapes += conv(4 * width, inputs, 1)
            inputs = 4 * width
    return (*shapes, (1000, inputs), (1000,))


@dataclass(frozen=True)
class Case:
    """One step that every side takes.

    Attributes:
        optimizer: the class's name in torch.optim; ours is Fused<name>.
        sides: the sides beside ours.
        ceiling: whether to move the same bytes with next to no arithmetic, beside the steps.
    """

    workload: str
    shapes: Shapes
    optimizer: str = "AdamW"
    options: Mapping[str, Any] = field(default_factory=dict)
    mode: Literal["plain", "clip", "amp"] = "clip"
    dtype: torch.dtype = torch.float32
    sides: tuple[str, ...] = ("torch fused", "torch foreach")
    ceiling: bool = False

    @property
    def title(self) -> str:
        dtype = "" if self.dtype == torch.float32 else str(self.dtype).removeprefix("torch.")
        mode = {"plain": "", "clip": "clipped", "amp": "scaler and clipped"}[self.mode]
        options = ",".join(map(str, self.options))
        return ", ".join(filter(None, (self.optimizer, options, self.workload, dtype, mode)))

    @property
    def elements(self) -> int:
        return sum(map(prod, self.shapes))

    @property
    def arrays(self) -> int:
        """How many arrays as large as the parameters a step reads and writes."""
        options = self.options
        if self.optimizer == "RMSprop":
            return 2 + bool(options.get("centered")) + bool(options.get("momentum"))
        if self.optimizer == "SGD":
            return 1 + bool(options.get("momentum"))
        return 3


def all_cases(scale: float = 1.0) -> list[Case]:
    """The most telling ones first. `scale` shrinks the number of elements, to try things out."""

    def one(count: float) -> Shapes:
        return ((max(64, int(count * scale)),),)

    def many(count: int, size: int) -> Shapes:
        return ((max(1, int(size * min(1.0, scale * 10))),),) * count

    def model(shapes: Shapes) -> Shapes:
        return shapes if scale == 1 else tuple((max(1, int(prod(s) * scale)),) for s in shapes)

    everyone = TORCH + OTHERS
    hundred = one(100e6)
    centered = {"centered": True, "momentum": 0.9}
    nesterov = {"momentum": 0.9, "nesterov": True}
    foreach = ("torch foreach",)
    return [
        Case("100M", hundred, sides=everyone, ceiling=True),
        Case("100M", hundred, mode="plain", sides=everyone, ceiling=True),
        Case("100M", hundred, mode="amp"),
        Case("1,000 of 64", ((64,),) * 1000, sides=everyone),
        Case("1,000 of 64", ((64,),) * 1000, mode="plain"),
        Case("ResNet-50", model(resnet50())),
        Case("GPT-2 small", model(gpt2_small())),
        Case("100M", hundred, dtype=torch.bfloat16, ceiling=True),
        Case("100M", hundred, "RMSprop", sides=(*foreach, "torch compiled"), ceiling=True),
        Case("100M", hundred, "RMSprop", centered, sides=foreach, ceiling=True),
        Case("100M", hundred, "NAdam", sides=foreach, ceiling=True),
        Case("100M", hundred, "SGD", {"lr": 1e-3, **nesterov}, ceiling=True),
        Case("100M", hundred, "Adam"),
        Case("1,000 of 100,000", many(1000, 100_000)),
        Case("1,000 of 99,999", many(1000, 99_999)),
        Case("1,000 of 100,000", many(1000, 100_000), mode="plain"),
        Case("1,000 of 99,999", many(1000, 99_999), mode="plain"),
        Case("10,000 of 1,024", ((1024,),) * 10_000),
        Case("Llama 1B", model(llama_1b()), dtype=torch.bfloat16, sides=("torch fused",)),
        Case("Llama 1B", model(llama_1b()), sides=("torch fused",)),
        Case("1G", one(1e9), sides=("torch fused",), ceiling=True),
        Case("1G", one(1e9), mode="plain", sides=("torch fused",), ceiling=True),
    ]


def make_params(shapes: Shapes, dtype: torch.dtype, device: str) -> list[Parameter]:
    params = [Parameter(torch.randn(shape, device=device).to(dtype)) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    return params


def make_optimizer(side: str, case: Case, params: list[Parameter]) -> torch.optim.Optimizer:
    if side in (OURS, OUR_SCALER):
        if side == OUR_SCALER and case.mode != "amp":
            raise Unavailable("only with a scaler")
        limit = None if case.mode == "plain" else 1.0
        cls = getattr(fusedopt, f"Fused{case.optimizer}")
        return cls(params, **case.options, max_grad_norm=limit)
    if side in TORCH:
        cls = getattr(torch.optim, case.optimizer)
        flag = "fused" if side == "torch fused" else "foreach"
        if flag not in inspect.signature(cls).parameters:
            raise Unavailable(f"torch.optim.{case.optimizer} has no {flag}")
        optimizer = cls(params, **case.options, **{flag: True})
        if side == "torch compiled":
            optimizer.step = torch.compile(optimizer.step)
        return optimizer
    module, name = {
        "apex": ("apex.optimizers", f"Fused{case.optimizer.removesuffix('W')}"),
        "deepspeed": ("deepspeed.ops.adam", "FusedAdam"),
        "bitsandbytes": ("bitsandbytes.optim", case.optimizer),
        "flashoptim": ("flashoptim", f"Flash{case.optimizer}"),
    }[side]
    if case.optimizer not in ("Adam", "AdamW"):
        raise Unavailable("only its Adam is measured")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            cls = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise Unavailable(f"{module}.{name} can't be imported: {error}") from error
    adam_w = {"adam_w_mode": case.optimizer == "AdamW"} if side in ("apex", "deepspeed") else {}
    return cls(params, **case.options, **adam_w)


def make_step(side: str, case: Case, params: list[Parameter]) -> Step:
    """What users of this side call once the gradients are there."""
    optimizer = make_optimizer(side, case, params)
    clips = side in (OURS, OUR_SCALER)
    if case.mode == "plain" or (case.mode == "clip" and clips):
        return optimizer.step

    def clip_and_step() -> None:
        clip_grad_norm_(params, 1.0)
        optimizer.step()

    if case.mode == "clip":
        return clip_and_step
    device = params[0].device.type
    # A scale of 1 leaves the gradients as they are, so that they serve every step of every side.
    cls = fusedopt.GradScaler if side == OUR_SCALER else torch.amp.GradScaler
    scaler = cls(device, init_scale=1.0, growth_interval=2**31 - 1)
    scaler.scale(torch.zeros((), device=device))

    def scaled_step() -> None:
        if not clips:
            scaler.unscale_(optimizer)
            clip_grad_norm_(params, 1.0)
        scaler.step(optimizer)
        scaler.update()

    return scaled_step


def timed(step: Step, device: str) -> float:
    """Seconds from an idle device to the end of the step; on a CPU, by the host's clock."""
    if device == "cpu":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    torch.cuda.synchronize()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    step()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


def interleaved(
    steps: Mapping[str, Step],
    seconds: float,
    measure: Callable[[Step], float],
    rounds: tuple[int, int] = (11, 200),
) -> dict[str, list[float]]:
    """Samples of all sides in turn, each round beginning with another one."""
    samples: dict[str, list[float]] = {side: [] for side in steps}
    for step in steps.values():
        for _ in range(3):
            step()
    order = list(steps)
    deadline = time.perf_counter() + seconds
    gc.collect()
    gc.disable()
    try:
        for number in itertools.count():
            late = time.perf_counter() > deadline
            if number >= rounds[1] or (late and number >= rounds[0]):
                return samples
            first = number % len(order)
            for side in order[first:] + order[:first]:
                samples[side].append(measure(steps[side]))
    finally:
        gc.enable()
    raise AssertionError("unreachable")
