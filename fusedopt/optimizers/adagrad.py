"""Adagrad."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.adagrad import adagrad
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
    grad = with_l2(group, param, grad)
    total = state["sum"] + grad * grad
    step_size = group["lr"] / (1 + (int(scalars["step"]) - 1) * group["lr_decay"])
    return param - step_size * (grad / (sqrt(total) + group["eps"])), {"sum": total}


def _torch_step(
    group: Group,
    params: list[Tensor],
    grads: list[Tensor],
    states: list[dict[str, Tensor]],
    fused: bool,
) -> None:
    adagrad(
        params,
        grads,
        column(states, "sum"),
        column(states, "step"),
        foreach=True,
        lr=float(group["lr"]),
        weight_decay=float(group["weight_decay"]),
        lr_decay=float(group["lr_decay"]),
        eps=float(group["eps"]),
        maximize=group["maximize"],
    )


ADAGRAD = Rule(
    "adagrad",
    scalars={"step": 0},
    tensors=("sum",),
    first_values={"sum": "initial_accumulator_value"},
    advance=count_step,
    update=_update,
    twin=Twin(_torch_step),
)


class FusedAdagrad(FusedOptimizer, torch.optim.Adagrad):
    """Adagrad (Duchi et al., 2011), with check, clipping and update in one step.

    With g the unscaled and clipped gradient, s the sum of squares, t the step:

        s = s + g^2
        param = param - lr / (1 + (t - 1) lr_decay) * g / (sqrt(s) + eps)

    State per parameter: `step` (0-d float32) and `sum` (s), of shape, dtype and device of the
    parameter. As torch's class, the constructor makes the state of its parameters. That of later
    param groups is made by their first step. Sparse gradients are refused.

    Args:
        params: parameters, (name, parameter) pairs, or dicts of param groups.
        lr: learning rate, a number or a tensor of one.
        lr_decay: how fast the learning rate falls.
        weight_decay: how much of the parameter is added to g.
        initial_accumulator_value: the number that s starts from.
        eps: added to the root.
        foreach, fused: accepted as torch's, and without effect: the step is always fused and
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

    rule = ADAGRAD

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
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
            lr_decay,
            weight_decay,
            initial_accumulator_value,
            eps,
            foreach,
            maximize=maximize,
            differentiable=differentiable,
            fused=fused,
        )
