"""The compiled step for plain arrays: NumPy's, and others on the CPU that speak DLPack.

    optimizer = fusedopt.arrays.AdamW([weight, bias], lr=1e-3, max_grad_norm=1.0)
    optimizer.step([weight_grad, bias_grad])

Each class has the formula, the defaults and the names of torch's class, and gives the bits of
fusedopt's class for torch. It needs NumPy, and no torch.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

from fusedopt.arrays.base import ArrayOptimizer

__all__ = [
    "ASGD",
    "LAMB",
    "LARS",
    "SGD",
    "AdEMAMix",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "ArrayOptimizer",
    "CautiousAdamW",
    "CautiousLion",
    "Lion",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "StableAdamW",
]


@dataclass(eq=False)
class Adadelta(ArrayOptimizer):
    """`torch.optim.Adadelta` over arrays; see `ArrayOptimizer`."""

    rule: ClassVar = "adadelta"
    lr: float = 1.0
    rho: float = 0.9
    eps: float = 1e-6
    weight_decay: float = 0.0
    _: KW_ONLY
    maximize: bool = False


@dataclass(eq=False)
class Adagrad(ArrayOptimizer):
    """`torch.optim.Adagrad` over arrays; see `ArrayOptimizer`."""

    rule: ClassVar = "adagrad"
    first_values: ClassVar = {"sum": "initial_accumulator_value"}
    lr: float = 1e-2
    lr_decay: float = 0.0
    weight_decay: float = 0.0
    initial_accumulator_value: float = 0.0
    eps: float = 1e-10
    _: KW_ONLY
    maximize: bool = False


@dataclass(eq=False)
class Adam(ArrayOptimizer):
    """`torch.optim.Adam` over arrays; see `ArrayOptimizer`."""

    rule: ClassVar = "adam"
    eps_hat: ClassVar = False
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    amsgrad: bool = False
    _: KW_ONLY
    maximize: bool = False
    decoupled_weight_decay: bool = False


@dataclass(eq=False)
class AdamW(ArrayOptimizer):
    """`torch.optim.AdamW` over arrays; see `ArrayOptimizer`."""

    rule: ClassVar = "adam"
    eps_hat: ClassVar = False
    decoupled_weight_decay: ClassVar = True
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    amsgrad: bool = False
    _: KW_ONLY
    maximize: bool = False


@dataclass(eq=False)
class CautiousAdamW(AdamW):
    """`fusedopt.FusedAdamW` with `cautious=True` over arrays; see `ArrayOptimizer`."""

    rule: ClassVar = "cautious_adamw"


@dataclass(eq=False)
class Adamax(ArrayOptimizer):
    """`torch.optim.Adamax` over arrays; see `ArrayOptimizer`."""

    rule: ClassVar = "adamax"
    lr: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    _: KW_ONLY
    maximize: bool = False


@dataclass(eq=False)
class AdEMAMix(ArrayOptimizer):
    """`fusedopt.FusedAdEMAMix` over arrays; see `ArrayOptimizer`. Warm-ups of 0 steps are none."""

    rule: ClassVar = "ademamix"
    lr: float = 1e-3
    betas: tuple[float, float, float] = (0.9, 0.999, 0.9999)
    alpha: float = 2.0
    beta3_warmup: int = 0
    alpha_warmup: int = 0
    eps: float = 1e-8
    weight_decay: float = 0.0
    _: KW_ONLY
    maximize: bool = False


@dataclass(eq=False)
class ASGD(ArrayOptimizer):
    """`torch.optim.ASGD` over arrays; see `ArrayOptimizer`."""

    rule: ClassVar = "asgd"
    first_values: ClassVar = {"eta": "lr"}
    lr: float = 1e-2
    lambd: float = 1e-4
    alpha: float = 0.75
    t0: float = 1e6
    weight_decay: float = 0.0
    _: KW_ONLY
    maximize: bool = False


@dataclass(eq=False)
class LAMB(ArrayOptimizer):
    """`fusedopt.FusedLAMB` over arrays; see `ArrayOptimizer`."""

    rule: ClassVar = "lamb"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    weight_decay: float = 0.01
    _: KW_ONLY
    bias_correction: bool = True
    trust_clip: bool = False
    always_adapt: bool = False
    maximize: bool = False


@dataclass(eq=False)
class LARS(ArrayOptimizer):
    """`fusedopt.FusedLARS` over arrays; see `ArrayOptimizer`."""

    rule: ClassVar = "lars"
    lr: float = 1.0
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    trust_coefficient: float = 0.001
    eps: float = 1e-8
    trust_clip: bool = False
    always_adapt: bool = False
    _: KW_ONLY
    maximize: bool = False

    def _check_options(self) -> None:
        _check_nesterov(self)


@dataclass(eq=False)
class Lion(ArrayOptimizer):
    """`fusedopt.FusedLion` over arrays; see `ArrayOptimizer`."""

    rule: ClassVar = "lion"
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    _: KW_ONLY
    maximize: bool = False


@dataclass(eq=False)
class CautiousLion(Lion):
    """`fusedopt.FusedLion` with `cautious=True` over arrays; see `ArrayOptimizer`."""

    rule: ClassVar = "cautious_lion"


@dataclass(eq=False)
class NAdam(ArrayOptimizer):
    """`torch.optim.NAdam` over arrays; see `ArrayOptimizer`."""

    rule: ClassVar = "nadam"
    lr: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum_decay: float = 4e-3
    decoupled_weight_decay: bool = False
    _: KW_ONLY
    maximize: bool = False


@dataclass(eq=False)
class RAdam(ArrayOptimizer):
    """`torch.optim.RAdam` over arrays; see `ArrayOptimizer`."""

    rule: ClassVar = "radam"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled_weight_decay: bool = False
    _: KW_ONLY
    maximize: bool = False


@dataclass(eq=False)
class RMSprop(ArrayOptimizer):
    """`torch.optim.RMSprop` over arrays; see `ArrayOptimizer`."""

    rule: ClassVar = "rmsprop"
    eps_in_sqrt: ClassVar = False
    lr_in_momentum: ClassVar = False
    decoupled_weight_decay: ClassVar = False
    lr: float = 1e-2
    alpha: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0
    centered: bool = False
    _: KW_ONLY
    maximize: bool = False


@dataclass(eq=False)
class Rprop(ArrayOptimizer):
    """`torch.optim.Rprop` over arrays; see `ArrayOptimizer`."""

    rule: ClassVar = "rprop"
    first_values: ClassVar = {"step_size": "lr"}
    lr: float = 1e-2
    etas: tuple[float, float] = (0.5, 1.2)
    step_sizes: tuple[float, float] = (1e-6, 50.0)
    _: KW_ONLY
    maximize: bool = False

    def _check_options(self) -> None:
        smaller, larger = self.etas
        if not 0 < smaller < 1 < larger:
            raise ValueError(f"Invalid etas value: {self.etas}; expected 0 < etas[0] < 1 < etas[1]")


@dataclass(eq=False)
class SGD(ArrayOptimizer):
    """`torch.optim.SGD` over arrays; see `ArrayOptimizer`."""

    rule: ClassVar = "sgd"
    lr_in_momentum: ClassVar = False
    decoupled_weight_decay: ClassVar = False
    lr: float = 1e-3
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    _: KW_ONLY
    maximize: bool = False

    def _check_options(self) -> None:
        _check_nesterov(self)


@dataclass(eq=False)
class StableAdamW(ArrayOptimizer):
    """`fusedopt.FusedStableAdamW` over arrays; see `ArrayOptimizer`."""

    rule: ClassVar = "stable_adamw"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-6
    weight_decay: float = 0.01
    _: KW_ONLY
    maximize: bool = False


def _check_nesterov(it: LARS | SGD) -> None:
    if it.nesterov and (it.momentum <= 0 or it.dampening != 0):
        raise ValueError(
            f"nesterov=True with momentum={it.momentum} and dampening={it.dampening}; "
            "expected a momentum > 0 and no dampening"
        )
