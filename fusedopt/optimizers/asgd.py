"""Averaged gradient descent."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.asgd import asgd
from torch.optim.optimizer import ParamsT

from fusedopt.clip import AdaptiveClip
from fusedopt.core.optimizer import Backend, FusedOptimizer
from fusedopt.core.settings import MasterWeights, NonFinite, Plain, Rounding, StateDtype
from fusedopt.reference import Group, Rule, Twin
from fusedopt.reference.arithmetic import real_power
from fusedopt.reference.rule import column, with_l2


def _update(
    group: Group, scalars: dict[str, Tensor], param: Tensor, grad: Tensor, state: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    eta, mu = float(scalars["eta"]), float(scalars["mu"])
    grad = with_l2(group, param, grad)
    param = param * (1 - group["lambd"] * eta) - eta * grad
    ax = state["ax"]
    return param, {"ax": ax + (param - ax) * mu if mu != 1 else param}


def _advance(group: Group, scalars: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**scalars, "step": scalars["step"] + 1}


def _prepare_next(group: Group, scalars: dict[str, Tensor]) -> dict[str, Tensor]:
    step, lr = float(scalars["step"]), float(group["lr"])
    growth = real_power(1 + float(group["lambd"]) * lr * step, float(group["alpha"]))
    eta, mu = lr / growth, 1 / max(1.0, step - float(group["t0"]))
    return {**scalars, "eta": torch.tensor(eta), "mu": torch.tensor(mu)}


def _torch_step(
    group: Group,
    params: list[Tensor],
    grads: list[Tensor],
    states: list[dict[str, Tensor]],
    fused: bool,
) -> None:
    asgd(
        params,
        grads,
        column(states, "ax"),
        column(states, "mu"),
        column(states, "eta"),
        column(states, "step"),
        foreach=params[0].is_cuda,  # elsewhere it computes eta in float32
        maximize=group["maximize"],
        capturable=params[0].is_cuda,
        lambd=float(group["lambd"]),
        lr=float(group["lr"]),
        t0=float(group["t0"]),
        alpha=float(group["alpha"]),
        weight_decay=float(group["weight_decay"]),
    )


ASGD = Rule(
    "asgd",
    scalars={"step": 0, "eta": 0, "mu": 1},
    tensors=("ax",),
    first_values={"eta": "lr"},
    advance=_advance,
    update=_update,
    prepare_next=_prepare_next,
    any_sign=("lambd", "alpha", "t0"),
    twin=Twin(_torch_step),
)


class FusedASGD(FusedOptimizer, torch.optim.ASGD):
    """Averaged gradient descent (Polyak and Juditsky, 1992), in one step.

    With g the unscaled and clipped gradient, a the average, t the step:

        param = (1 - lambd eta) param - eta g
        a = a + mu (param - a)
        eta = lr / (1 + lambd lr t)^alpha
        mu = 1 / max(1, t - t0)

    eta starts from lr, and mu from 1. State per parameter: `step`, `eta` and `mu` (0-d float32),
    and `ax` (a), of shape, dtype and device of the parameter.

    Args:
        params: parameters, (name, parameter) pairs, or dicts of param groups.
        lr: learning rate, a number or a tensor of one.
        lambd: how much of the parameter decays, and how fast eta falls.
        alpha: the power of eta's fall.
        t0: the step at which averaging begins.
        weight_decay: how much of the parameter is added to g.
        foreach, capturable: accepted as torch's, and without effect: the step is always fused and
            capturable.
        maximize: go up the gradient.
        differentiable: True is refused: autograd can't look into a fused step.
        max_grad_norm: the largest global L2 norm that is not clipped, or a limit of
            `fusedopt.clip`, or None, which never clips.
        nonfinite: the reaction to inf or nan in gradients: "skip" changes nothing, "raise" raises
            `NonFiniteGradientError` as well (and waits for the device), "propagate" updates as
            torch does. None is "skip" with `max_grad_norm`, else "propagate".
        backend: "cuda", "cpu", "reference" (plain torch), or None: by the parameters' device.
        telemetry: the number of steps to keep measurements of, or None.
        max_consecutive_skips: after this number of skipped steps in a row, `step` raises
            `TooManySkipsError`; None never does.
        process_group: the ranks that step together, a ProcessGroup or a DeviceMesh; None: those
            of the parameters' mesh, if they are DTensors.
        plain: whether parameters that are no DTensors are the same on all ranks: "replicated", or
            "own" if each rank has its own.
        check_replicas: once in this many steps, the ranks compare the gradients that they should
            have in common; None: never.
        master_weights: "exact" trains 16-bit parameters as float32, with the missing bits in the
            state; "24bit" as numbers of 24 bits; None: there is no master.
        state_dtype: torch.float32, torch.bfloat16 or "8bit"; None: the states have the
            parameter's.
        rounding: "nearest", "stochastic", or None: of second moments at random, else to nearest.
        seed: of the random rounding.

    `FusedOptimizer` says more of these twelve, and of what is refused.
    """

    rule = ASGD

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lambd: float = 1e-4,
        alpha: float = 0.75,
        t0: float = 1e6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        *,
        max_grad_norm: float | AdaptiveClip | None = None,
        nonfinite: NonFinite | None = None,
        backend: Backend | None = None,
        telemetry: int | None = None,
        max_consecutive_skips: int | None = None,
        process_group: ProcessGroup | DeviceMesh | None = None,
        plain: Plain = "replicated",
        check_replicas: int | None = None,
        master_weights: MasterWeights | None = None,
        state_dtype: StateDtype | None = None,
        rounding: Rounding | None = None,
        seed: int | None = None,
    ) -> None:
        self._configure(
            max_grad_norm,
            nonfinite,
            backend,
            telemetry,
            max_consecutive_skips,
            process_group,
            plain,
            check_replicas,
            master_weights=master_weights,
            state_dtype=state_dtype,
            rounding=rounding,
            seed=seed,
        )
        super().__init__(
            params,
            lr,
            lambd,
            alpha,
            t0,
            weight_decay,
            foreach,
            maximize,
            differentiable,
            capturable,
        )
