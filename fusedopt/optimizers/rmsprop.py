"""RMSprop."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.optimizer import ParamsT
from torch.optim.rmsprop import rmsprop

from fusedopt.clip import AdaptiveClip
from fusedopt.core.optimizer import Backend, FusedOptimizer
from fusedopt.core.settings import MasterWeights, NonFinite, Plain, Rounding, StateDtype
from fusedopt.reference import Group, Rule, Twin, count_step
from fusedopt.reference.arithmetic import sqrt
from fusedopt.reference.rule import column, with_decay


def _update(
    group: Group, scalars: dict[str, Tensor], param: Tensor, grad: Tensor, state: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    alpha, momentum = group["alpha"], group["momentum"]
    param, grad = with_decay(group, param, grad)
    square_avg = alpha * state["square_avg"] + ((1 - alpha) * grad) * grad
    new_state = {"square_avg": square_avg}
    variance = square_avg
    if group["centered"]:
        grad_avg = alpha * state["grad_avg"] + (1 - alpha) * grad
        new_state["grad_avg"] = grad_avg
        variance = square_avg - grad_avg * grad_avg
        # Rounding can push a zero variance below zero; a nan stays one.
        variance = torch.where(variance < 0, torch.zeros_like(variance), variance)
    in_sqrt, eps = (group["eps"], 0.0) if group.get("eps_in_sqrt") else (0.0, group["eps"])
    lr, direction = group["lr"], grad / (sqrt(variance + in_sqrt) + eps)
    if momentum > 0:
        lr, share = (1.0, lr) if group.get("lr_in_momentum") else (lr, 1.0)
        direction = momentum * state["momentum_buffer"] + share * direction
        new_state["momentum_buffer"] = direction
    return param - lr * direction, new_state


def _torch_step(
    group: Group,
    params: list[Tensor],
    grads: list[Tensor],
    states: list[dict[str, Tensor]],
    fused: bool,
) -> None:
    momentum = float(group["momentum"])
    rmsprop(
        params,
        grads,
        column(states, "square_avg"),
        [],
        column(states, "momentum_buffer") if momentum > 0 else [],
        column(states, "step"),
        foreach=True,
        maximize=group["maximize"],
        capturable=params[0].is_cuda,
        lr=float(group["lr"]),
        alpha=float(group["alpha"]),
        eps=float(group["eps"]),
        weight_decay=float(group["weight_decay"]),
        momentum=momentum,
        centered=False,
    )


# Centered, torch's function takes the root of a variance that rounding made negative.
RMSPROP = Rule(
    "rmsprop",
    scalars={"step": 0},
    tensors=("square_avg", "grad_avg", "momentum_buffer"),
    codings={"square_avg": "root", "momentum_buffer": "linear"},
    optional={
        "grad_avg": lambda group: group["centered"],
        "momentum_buffer": lambda group: group["momentum"] > 0,
    },
    advance=count_step,
    update=_update,
    twin=Twin(
        _torch_step,
        suits=lambda group: (
            not any(
                group.get(name)
                for name in ("centered", "eps_in_sqrt", "lr_in_momentum", "decoupled_weight_decay")
            )
        ),
    ),
)


class FusedRMSprop(FusedOptimizer, torch.optim.RMSprop):
    """RMSprop (Tieleman and Hinton, 2012), with check, clipping and update in one step.

    With g the unscaled and clipped gradient:

        s = alpha s + (1 - alpha) g^2
        param = param - lr * g / (sqrt(s) + eps)

    `centered=True` takes the variance s - a^2 in place of s, with a = alpha a + (1 - alpha) g
    (Graves, 2013, arXiv:1308.0850); a variance that rounding makes negative counts as 0, where
    torch gives nan. With `momentum`, the quotients add up in a buffer b = momentum b + quotient.

    State per parameter: `step` (0-d float32), `square_avg` and, where used, `grad_avg` and
    `momentum_buffer` (shape, dtype and device of the parameter).

    Args:
        params: parameters, (name, parameter) pairs, or dicts of param groups.
        lr: learning rate, a number or a tensor of one.
        alpha: how much of the averages stays from step to step.
        eps: keeps the denominator above 0.
        weight_decay: how much of the parameter is added to g.
        momentum: how much of the buffer stays from step to step; 0: there is none.
        centered: divide by the standard deviation instead.
        capturable, foreach: accepted as torch's, and without effect: the step is always fused and
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

    rule = RMSPROP

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
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
            alpha,
            eps,
            weight_decay,
            momentum,
            centered,
            capturable,
            foreach,
            maximize,
            differentiable,
        )
