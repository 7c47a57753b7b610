"""Adadelta."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.adadelta import adadelta
from torch.optim.optimizer import ParamsT

from fusedopt.clip import AdaptiveClip
from fusedopt.core.optimizer import Backend, FusedOptimizer
from fusedopt.core.settings import MasterWeights, NonFinite, Plain, Rounding, StateDtype
from fusedopt.reference import Group, Rule, Twin, count_step
from fusedopt.reference.arithmetic import sqrt
from fusedopt.reference.rule import column, with_l2


def _update(
    group: Group, scalars: dict[str, Tensor], param: Tensor, grad: Tensor, state: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    rho, eps = group["rho"], group["eps"]
    grad = with_l2(group, param, grad)
    square_avg = rho * state["square_avg"] + ((1 - rho) * grad) * grad
    delta = sqrt(state["acc_delta"] + eps) / sqrt(square_avg + eps) * grad
    acc_delta = rho * state["acc_delta"] + ((1 - rho) * delta) * delta
    return param - group["lr"] * delta, {"square_avg": square_avg, "acc_delta": acc_delta}


def _torch_step(
    group: Group,
    params: list[Tensor],
    grads: list[Tensor],
    states: list[dict[str, Tensor]],
    fused: bool,
) -> None:
    adadelta(
        params,
        grads,
        column(states, "square_avg"),
        column(states, "acc_delta"),
        column(states, "step"),
        foreach=True,
        capturable=params[0].is_cuda,
        lr=float(group["lr"]),
        rho=float(group["rho"]),
        eps=float(group["eps"]),
        weight_decay=float(group["weight_decay"]),
        maximize=group["maximize"],
    )


ADADELTA = Rule(
    "adadelta",
    scalars={"step": 0},
    tensors=("square_avg", "acc_delta"),
    codings={"square_avg": "root", "acc_delta": "root"},
    advance=count_step,
    update=_update,
    twin=Twin(_torch_step),
)


class FusedAdadelta(FusedOptimizer, torch.optim.Adadelta):
    """Adadelta (Zeiler, 2012, arXiv:1212.5701), with check, clipping and update in one step.

    With g the unscaled and clipped gradient, s and a the averages of squares:

        s = rho s + (1 - rho) g^2
        d = sqrt(a + eps) / sqrt(s + eps) * g
        a = rho a + (1 - rho) d^2
        param = param - lr * d

    State per parameter: `step` (0-d float32), `square_avg` (s) and `acc_delta` (a), of shape, dtype
    and device of the parameter.

    Args:
        params: parameters, (name, parameter) pairs, or dicts of param groups.
        lr: learning rate, a number or a tensor of one.
        rho: how much of the averages stays from step to step.
        eps: added under both roots.
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

    rule = ADADELTA

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        capturable: bool = False,
        maximize: bool = False,
        differentiable: bool = False,
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
            rho,
            eps,
            weight_decay,
            foreach,
            capturable=capturable,
            maximize=maximize,
            differentiable=differentiable,
        )
