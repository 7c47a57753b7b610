"""The table of cases: classes, torch's classes, and the options that change the formula."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import twins
from torch import Tensor
from torch.nn import Parameter

import fusedopt
from fusedopt.optimizers.adam import CAUTIOUS_ADAMW
from fusedopt.optimizers.lion import CAUTIOUS_LION


class FusedCautiousAdamW(fusedopt.FusedAdamW):
    # `cautious=True` as a class: the table has one class for each rule. test_cautious.py has the
    # option.
    __doc__ = fusedopt.FusedAdamW.__doc__
    rule = CAUTIOUS_ADAMW


class FusedCautiousLion(fusedopt.FusedLion):
    __doc__ = fusedopt.FusedLion.__doc__
    rule = CAUTIOUS_LION


@dataclass(frozen=True)
class Case:
    cls: type[fusedopt.FusedOptimizer]
    twin: type[torch.optim.Optimizer]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        options = ",".join(f"{key}={value}" for key, value in self.kwargs.items())
        return f"{self.cls.__name__}({options})"


def cases_of(cls: type, twin: type, *options: dict[str, Any]) -> list[Case]:
    return [Case(cls, twin, kwargs) for kwargs in ({}, *options)]


CASES = [
    *cases_of(
        fusedopt.FusedAdam,
        torch.optim.Adam,
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
        {"amsgrad": True},
        {"amsgrad": True, "maximize": True, "weight_decay": 0.1},
        {"lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-3},
        {"betas": (0.0, 0.0)},
    ),
    *cases_of(
        fusedopt.FusedAdamW,
        torch.optim.AdamW,
        {"weight_decay": 0.0},
        {"amsgrad": True, "maximize": True},
    ),
    *cases_of(
        fusedopt.FusedNAdam,
        torch.optim.NAdam,
        {"weight_decay": 0.1, "maximize": True},
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
        {"lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-3, "momentum_decay": 0.5},
        {"betas": (0.0, 0.0), "momentum_decay": 0.0},
    ),
    *cases_of(
        fusedopt.FusedSGD,
        torch.optim.SGD,
        {"weight_decay": 0.1, "maximize": True},
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "lr": 0.1},
    ),
    *cases_of(
        fusedopt.FusedRMSprop,
        torch.optim.RMSprop,
        {"weight_decay": 0.1},
        {"momentum": 0.9},
        {"centered": True},
        {"centered": True, "momentum": 0.9, "weight_decay": 0.1, "maximize": True},
        {"lr": 0.1, "alpha": 0.5, "eps": 1e-3},
    ),
    *cases_of(
        fusedopt.FusedAdadelta,
        torch.optim.Adadelta,
        {"weight_decay": 0.1, "maximize": True},
        {"lr": 0.1, "rho": 0.5, "eps": 1e-3},
    ),
    *cases_of(
        fusedopt.FusedAdamax,
        torch.optim.Adamax,
        {"weight_decay": 0.1, "maximize": True},
        {"lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-3},
        {"betas": (0.0, 0.0)},
    ),
    # Rectification begins at the sixth step; without beta2 it never does.
    *cases_of(
        fusedopt.FusedRAdam,
        torch.optim.RAdam,
        {"weight_decay": 0.1, "maximize": True},
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
        {"lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-3},
        {"betas": (0.0, 0.0)},
    ),
    *cases_of(
        fusedopt.FusedAdagrad,
        torch.optim.Adagrad,
        {"weight_decay": 0.1, "maximize": True},
        {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.5, "eps": 1e-3},
    ),
    # Averaging begins at the third step.
    *cases_of(
        fusedopt.FusedASGD,
        torch.optim.ASGD,
        {"weight_decay": 0.1, "maximize": True},
        {"lr": 0.1, "lambd": 0.1, "alpha": 0.6, "t0": 1.0},
        {"lambd": -0.01, "alpha": -1.25, "t0": -2.0},
    ),
    *cases_of(
        fusedopt.FusedRprop,
        torch.optim.Rprop,
        {"maximize": True},
        {"lr": 0.1, "etas": (0.3, 1.5), "step_sizes": (0.05, 0.12)},
    ),
    *cases_of(
        fusedopt.FusedLion,
        twins.Lion,
        {"weight_decay": 0.1, "maximize": True},
        {"lr": 0.1, "betas": (0.5, 0.9)},
    ),
    *cases_of(
        FusedCautiousAdamW,
        twins.CautiousAdamW,
        {"amsgrad": True, "maximize": True, "lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-3},
    ),
    *cases_of(
        FusedCautiousLion,
        twins.CautiousLion,
        {"weight_decay": 0.1, "maximize": True, "lr": 0.1, "betas": (0.5, 0.9)},
    ),
    *cases_of(
        fusedopt.FusedLAMB,
        twins.LAMB,
        {"weight_decay": 0.0},
        {"weight_decay": 0.0, "always_adapt": True, "maximize": True},
        {"lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.1, "trust_clip": True},
        {"betas": (0.0, 0.0), "bias_correction": False},
    ),
    *cases_of(
        fusedopt.FusedStableAdamW,
        twins.StableAdamW,
        {"weight_decay": 0.0, "maximize": True},
        {"lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.1},
        {"betas": (0.0, 0.0)},
    ),
    *cases_of(
        fusedopt.FusedLARS,
        twins.LARS,
        {"weight_decay": 0.1, "maximize": True},
        {"momentum": 0.9, "weight_decay": 0.1, "trust_coefficient": 0.1},
        {"momentum": 0.9, "dampening": 0.5, "always_adapt": True, "eps": 0.1},
        {"lr": 0.01, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "trust_clip": True},
    ),
    # The warm-ups end within seven steps, and not.
    *cases_of(
        fusedopt.FusedAdEMAMix,
        twins.AdEMAMix,
        {"weight_decay": 0.1, "maximize": True},
        {"lr": 0.1, "betas": (0.5, 0.9, 0.99), "alpha": 5.0, "eps": 1e-3},
        {"beta3_warmup": 5, "alpha_warmup": 4},
        {"beta3_warmup": 100, "alpha_warmup": 50},
    ),
]
# Each class once, with options under which it has a state to keep.
TYPICAL = {
    fusedopt.FusedSGD: {"momentum": 0.9, "dampening": 0.5},
    fusedopt.FusedLARS: {"momentum": 0.9, "always_adapt": True},
}
CLASSES = [
    Case(case.cls, case.twin, TYPICAL.get(case.cls, {})) for case in CASES if not case.kwargs
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

# One element, odd sizes, a chunk and one more, several chunks; empty ones first, between and last.
SHAPES = [(0,), (1,), (), (3,), (555,), (0, 4), (16384,), (16385,), (2, 33, 41), (33333,), (0,)]


def make_params(shapes=SHAPES, dtype=torch.float32, device="cpu", seed=0) -> list[Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in shapes
    ]


def set_grads(params: list[Parameter], seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        grad = torch.randn(param.shape, generator=generator, dtype=torch.float64) * scale
        param.grad = grad.to(param.device, param.dtype)


def tensors_of(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every parameter and every state tensor, by name."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    found = {f"param {i}": p.detach() for i, p in enumerate(params)}
    for i, param in enumerate(params):
        for key, value in optimizer.state.get(param, {}).items():
            found[f"{key} {i}"] = value
    return found


def step_counts(optimizer: torch.optim.Optimizer) -> list[int]:
    """How many steps each parameter has seen; of rules that keep no count, whether any."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    counts = [optimizer.state.get(p, {"step": 0}) for p in params]
    return [int(state.get("step", 1)) for state in counts]


def snapshot(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in tensors_of(optimizer).items()}


INTEGER_OF = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit, except that a nan is a nan: processors differ in its payload."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = a.detach().cpu().contiguous(), b.detach().cpu().contiguous()
    integer = INTEGER_OF[a.element_size()]
    return bool(((a.view(integer) == b.view(integer)) | (a.isnan() & b.isnan())).all())


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    different = [name for name in actual if not same_bits(actual[name], expected[name])]
    assert not different, f"bits differ in {different}"
