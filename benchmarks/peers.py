"""The sides of a comparison: ours, torch's, and other libraries', each as a function of one step.

A side that can't run here, or not in this case, raises `Unavailable` and says why.
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

import fusedopt
from benchmarks.cases import OPTIMIZERS, Case
from benchmarks.timing import Step

OURS = "fusedopt"
OUR_SCALER = "fusedopt with its own scaler"


class Unavailable(Exception):
    """Why a side can't be measured."""


@dataclass(frozen=True)
class Side:
    """One optimizer, as its users have it.

    Attributes:
        make: from the case and its parameters to the optimizer.
        clips: whether its step clips by itself; else `clip_grad_norm_` comes first.
        counted: whether all that it moves passes torch's dispatcher (see `traffic`).
    """

    make: Callable[[Case, list[Parameter]], Optimizer]
    clips: bool = False
    counted: bool = False


def ours(case: Case, params: list[Parameter]) -> Optimizer:
    cls = attribute(fusedopt, f"Fused{case.optimizer}")
    max_grad_norm = None if case.mode == "plain" else 1.0
    return cls(params, **OPTIMIZERS[case.optimizer], max_grad_norm=max_grad_norm)


def torchs(**flags: bool) -> Callable[[Case, list[Parameter]], Optimizer]:
    def make(case: Case, params: list[Parameter]) -> Optimizer:
        cls = getattr(torch.optim, case.optimizer)
        missing = [name for name in flags if name not in inspect.signature(cls).parameters]
        if missing:
            raise Unavailable(f"torch.optim.{case.optimizer} has no {', '.join(missing)}")
        return cls(params, **OPTIMIZERS[case.optimizer], **flags)

    return make


def compiled(case: Case, params: list[Parameter]) -> Optimizer:
    # On a CPU every tensor becomes a loop of its own: about half a second of compilation for each.
    limit = 200 if params[0].device.type == "cpu" else 2000
    if len(params) > limit:
        raise Unavailable(f"torch.compile takes too long for more than {limit} tensors")
    optimizer = torchs(foreach=True)(case, params)
    optimizer.step = torch.compile(optimizer.step)
    return optimizer


def deepspeed(case: Case, params: list[Parameter]) -> Optimizer:
    if params[0].device.type != "cpu":
        raise Unavailable("DeepSpeedCPUAdam is for parameters on a CPU")
    if case.optimizer not in ("Adam", "AdamW"):
        raise Unavailable(f"DeepSpeed has no {case.optimizer} for a CPU")
    cls = load("deepspeed.ops.adam").DeepSpeedCPUAdam
    adamw = case.optimizer == "AdamW"
    return cls(params, **OPTIMIZERS[case.optimizer], adamw_mode=adamw)


def bitsandbytes(case: Case, params: list[Parameter]) -> Optimizer:
    return attribute(load("bitsandbytes").optim, case.optimizer)(
        params, **OPTIMIZERS[case.optimizer]
    )


def optimi(case: Case, params: list[Parameter]) -> Optimizer:
    return attribute(load("optimi"), case.optimizer)(params, **OPTIMIZERS[case.optimizer])


def torchao(case: Case, params: list[Parameter]) -> Optimizer:
    # Its optimizers keep their state in 8 or 4 bits: fewer bytes, other numbers.
    cls = attribute(load("torchao.optim"), f"{case.optimizer}8bit")
    return cls(params, **OPTIMIZERS[case.optimizer])


SIDES = {
    OURS: Side(ours, clips=True),
    OUR_SCALER: Side(ours, clips=True),
    "torch for-loop": Side(torchs(foreach=False), counted=True),
    "torch foreach": Side(torchs(foreach=True), counted=True),
    "torch fused": Side(torchs(fused=True), counted=True),
    "torch compiled": Side(compiled),
    "DeepSpeed": Side(deepspeed),
    "bitsandbytes": Side(bitsandbytes),
    "optimi": Side(optimi, counted=True),
    "torchao 8-bit": Side(torchao),
}


def load(module: str) -> ModuleType:
    """Imports a library that need not be there, whatever it warns of."""
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


def make_optimizer(name: str, case: Case, params: list[Parameter]) -> Optimizer:
    if name == OUR_SCALER and (case.mode != "amp" or not hasattr(fusedopt, "GradScaler")):
        raise Unavailable("only with a scaler, and where fusedopt.GradScaler is")
    return SIDES[name].make(case, params)


def make_step(name: str, case: Case, params: list[Parameter]) -> tuple[Step, Optimizer]:
    """What users of this side call once the gradients are there, and the optimizer."""
    optimizer = make_optimizer(name, case, params)
    clips = SIDES[name].clips

    def clip_and_step() -> None:
        clip_grad_norm_(params, 1.0)
        optimizer.step()

    if case.mode == "plain" or (case.mode == "clip" and clips):
        return optimizer.step, optimizer
    if case.mode == "clip":
        return clip_and_step, optimizer

    device = params[0].device.type
    scaler_class = fusedopt.GradScaler if name == OUR_SCALER else torch.amp.GradScaler  # type: ignore[attr-defined]
    # A scale of 1 leaves the gradients as they are, so that they serve every step of every side.
    scaler = scaler_class(device, init_scale=1.0, growth_interval=2**31 - 1)
    scaler.scale(torch.zeros((), device=device))

    def scaled_step() -> None:
        if not clips:
            scaler.unscale_(optimizer)
            clip_grad_norm_(params, 1.0)
        scaler.step(optimizer)
        scaler.update()

    return scaled_step, optimizer
