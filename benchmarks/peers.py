"""The sides of a comparison: our optimizer, torch's, and other libraries'. Each makes a step.

A side that can't run on this machine, or not in this case, raises `Unavailable` and says why.
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

import fusedopt
from benchmarks.cases import Case
from benchmarks.timing import Step

Clip = Callable[[list[Parameter], float], object]

OURS = "fusedopt"
OUR_SCALER = "fusedopt with its own scaler"
OUR_TELEMETRY = "fusedopt with telemetry"


class Unavailable(Exception):
    """A side can't be measured; the message says why."""


@dataclass(frozen=True)
class Contender:
    """One optimizer, as its users call it.

    Attributes:
        make: makes the optimizer from the case and its parameters.
        clips: whether its step clips; else `clip_grad_norm_` is called first.
        counted: whether torch's dispatcher sees all bytes that it moves (see `traffic`).
        find_clip: returns the library's `clip_grad_norm_`.
    """

    make: Callable[[Case, list[Parameter]], Optimizer]
    clips: bool = False
    counted: bool = False
    find_clip: Callable[[], Clip] = lambda: clip_grad_norm_


def ours(case: Case, params: list[Parameter], **more: Any) -> Optimizer:
    cls = attribute(fusedopt, f"Fused{case.recipe.name}")
    max_grad_norm = None if case.mode == "plain" else 1.0
    return cls(params, **case.recipe.options, max_grad_norm=max_grad_norm, **more)


def with_telemetry(case: Case, params: list[Parameter]) -> Optimizer:
    if case.mode != "clip" or case.optimizer != "AdamW":
        raise Unavailable("what it costs is measured with AdamW, clipped")
    return ours(case, params, telemetry=100)


def torchs(**flags: bool) -> Callable[[Case, list[Parameter]], Optimizer]:
    def make(case: Case, params: list[Parameter]) -> Optimizer:
        cls = getattr(torch.optim, case.recipe.name)
        missing = [name for name in flags if name not in inspect.signature(cls).parameters]
        if missing:
            raise Unavailable(f"torch.optim.{case.recipe.name} has no {', '.join(missing)}")
        return cls(params, **case.recipe.options, **flags)

    return make


def compiled(case: Case, params: list[Parameter]) -> Optimizer:
    # On a CPU torch.compile makes a loop for every tensor, which takes about half a second each.
    limit = 200 if params[0].device.type == "cpu" else 2000
    if len(params) > limit:
        raise Unavailable(f"torch.compile takes too long for more than {limit} tensors")
    optimizer = torchs(foreach=True)(case, params)
    optimizer.step = torch.compile(optimizer.step)
    return optimizer


def deepspeed(case: Case, params: list[Parameter]) -> Optimizer:
    check_adam("DeepSpeed", case)
    adamw = case.recipe.name == "AdamW"
    library = load("deepspeed.ops.adam")
    if params[0].device.type == "cpu":
        return library.DeepSpeedCPUAdam(params, **case.recipe.options, adamw_mode=adamw)
    return library.FusedAdam(params, **case.recipe.options, adam_w_mode=adamw)


def apex(case: Case, params: list[Parameter]) -> Optimizer:
    check_adam("Apex", case)
    check_on_gpu("Apex", params)
    cls = attribute(load("apex.optimizers"), "FusedAdam")
    return cls(params, **case.recipe.options, adam_w_mode=case.recipe.name == "AdamW")


def find_apexs_clip() -> Clip:
    return attribute(load("apex.contrib.clip_grad"), "clip_grad_norm_")


def bitsandbytes(case: Case, params: list[Parameter]) -> Optimizer:
    if case.recipe.options.get("nesterov"):
        raise Unavailable("bitsandbytes takes nesterov=True and does without")
    return attribute(load("bitsandbytes").optim, case.recipe.name)(params, **case.recipe.options)


def optimi(case: Case, params: list[Parameter]) -> Optimizer:
    return attribute(load("optimi"), case.recipe.name)(params, **case.recipe.options)


def torchao(case: Case, params: list[Parameter]) -> Optimizer:
    # Its optimizers keep their state in 8 or 4 bits: they move fewer bytes and give other results.
    cls = attribute(load("torchao.optim"), f"{case.recipe.name}8bit")
    return cls(params, **case.recipe.options)


def flashoptim(case: Case, params: list[Parameter]) -> Optimizer:
    # Its states have 8 bits, and 8 more bits of a 16-bit parameter: it gives other results.
    check_on_gpu("flashoptim", params)
    cls = attribute(load("flashoptim"), f"Flash{case.recipe.name}")
    return cls(params, **case.recipe.options)


def check_adam(library: str, case: Case) -> None:
    if case.recipe.name not in ("Adam", "AdamW"):
        raise Unavailable(f"{library} has no fused {case.recipe.name}")


def check_on_gpu(library: str, params: list[Parameter]) -> None:
    if params[0].device.type != "cuda":
        raise Unavailable(f"{library} is for parameters on a GPU")


SIDES = {
    OURS: Contender(ours, clips=True),
    OUR_SCALER: Contender(ours, clips=True),
    OUR_TELEMETRY: Contender(with_telemetry, clips=True),
    "torch for-loop": Contender(torchs(foreach=False), counted=True),
    "torch foreach": Contender(torchs(foreach=True), counted=True),
    "torch fused": Contender(torchs(fused=True), counted=True),
    "torch compiled": Contender(compiled),
    "Apex": Contender(apex, find_clip=find_apexs_clip),
    "DeepSpeed": Contender(deepspeed),
    "bitsandbytes": Contender(bitsandbytes),
    "optimi": Contender(optimi, counted=True),
    "torchao 8-bit": Contender(torchao),
    "flashoptim 8-bit": Contender(flashoptim),
}
# torch's optimizers can't be captured in a CUDA graph unless they are made with capturable=True.
IN_GRAPHS = {
    OURS: SIDES[OURS],
    "torch fused": Contender(torchs(fused=True, capturable=True)),
}


def load(module: str) -> ModuleType:
    """Imports a library that may be missing, and hides its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(module)
        except ImportError as error:
            raise Unavailable(f"{module} can't be imported: {error}") from error


def attribute(module: ModuleType, name: str) -> Any:
    if not hasattr(module, name):
        raise Unavailable(f"{module.__name__} has no {name}")
    return getattr(module, name)


def make_optimizer(
    name: str, case: Case, params: list[Parameter], sides: Mapping[str, Contender] = SIDES
) -> Optimizer:
    if name == OUR_SCALER and (case.mode != "amp" or not hasattr(fusedopt, "GradScaler")):
        raise Unavailable("only with a scaler, and where fusedopt.GradScaler is")
    return sides[name].make(case, params)


def make_step(
    name: str, case: Case, params: list[Parameter], sides: Mapping[str, Contender] = SIDES
) -> tuple[Step, Optimizer]:
    """The step as users of this side call it after the backward pass, and the optimizer."""
    optimizer = make_optimizer(name, case, params, sides)
    clips = sides[name].clips
    if case.mode == "plain" or (case.mode == "clip" and clips):
        return optimizer.step, optimizer
    clip = sides[name].find_clip()

    def clip_and_step() -> None:
        clip(params, 1.0)
        optimizer.step()

    if case.mode == "clip":
        return clip_and_step, optimizer

    device = params[0].device.type
    scaler_class = fusedopt.GradScaler if name == OUR_SCALER else torch.amp.GradScaler  # type: ignore[attr-defined]
    # A scale of 1 doesn't change the gradients, so that all steps of all sides can use them.
    scaler = scaler_class(device, init_scale=1.0, growth_interval=2**31 - 1)
    scaler.scale(torch.zeros((), device=device))

    def scaled_step() -> None:
        if not clips:
            scaler.unscale_(optimizer)
            clip(params, 1.0)
        scaler.step(optimizer)
        scaler.update()

    return scaled_step, optimizer
