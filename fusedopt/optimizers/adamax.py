"""Adamax."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.adamax import adamax
from torch.optim.optimizer import ParamsT

from fusedopt.clip import AdaptiveClip
from fusedopt.core.optimizer import Backend, FusedOptimizer
from fusedopt.core.settings import MasterWeights, NonFinite, Plain, Rounding, StateDtype
from fusedopt.reference import Group, Rule, Twin, count_step
from fusedopt.reference.arithmetic import power
from fusedopt.reference.rule import column, with_l2


def _update(
    group: Group, scalars: dict[str, Tensor], param: Tensor, grad: Tensor, state: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    beta1, beta2 = map(float, group["betas"])
    grad = with_l2(group, param, grad)
    exp_avg = beta1 * state["exp_avg"] + (1 - beta1) * grad
    exp_inf = torch.maximum(beta2 * state["exp_inf"], grad.abs() + group["eps"])
    step_size = group["lr"] / (1 - power(beta1, int(scalars["step"])))
    return param - step_size * (exp_avg / exp_inf), {"exp_avg": exp_avg, "exp_inf": exp_inf}


def _torch_step(
    group: Group,
    params: list[Tensor],
    grads: list[Tensor],
    states: list[dict[str, Tensor]],
    fused: bool,
) -> None:
    beta1, beta2 = map(float, group["betas"])
    adamax(
        params,
        grads,
        column(states, "exp_avg"),
        column(states, "exp_inf"),
        column(states, "step"),
        foreach=True,
        capturable=params[0].is_cuda,
        maximize=group["maximize"],
        eps=float(group["eps"]),
        beta1=beta1,
        beta2=beta2,
        lr=float(group["lr"]),
        weight_decay=float(group["weight_decay"]),
    )


ADAMAX = Rule(
    "adamax",
    scalars={"step": 0},
    tensors=("exp_avg", "exp_inf"),
    codings={"exp_avg": "linear"},
    advance=count_step,
    update=_update,
    twin=Twin(_torch_step),
)


class FusedAdamax(FusedOptimizer, torch.optim.Adamax):
    """Adamax (Kingma and Ba, 2015, arXiv:1412.6980): Adam with the infinity norm, in one step.

    With g the unscaled and clipped gradient, m and u the moments, t the step:

        m = beta1 m + (1 - beta1) g
        u = max(beta2 u, |g| + eps)
        param = param - lr / (1 - beta1^t) * m / u

    State per parameter: `step` (0-d float32), `exp_avg` (m) and `exp_inf` (u), of shape, dtype and
    device of the parameter.

    Args:
        params: parameters, (name, parameter) pairs, or dicts of param groups.
        lr: learning rate, a number or a tensor of one.
        betas: how much of m and of u stays from step to step.
        eps: keeps u above 0.
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

    rule = ADAMAX

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
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
            betas,
            eps,
            weight_decay,
            foreach,
            maximize=maximize,
            differentiable=differentiable,
            capturable=capturable,
        )
