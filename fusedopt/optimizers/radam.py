"""RAdam."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.optimizer import ParamsT
from torch.optim.radam import radam

from fusedopt.clip import AdaptiveClip
from fusedopt.core.optimizer import Backend, FusedOptimizer
from fusedopt.core.settings import MasterWeights, NonFinite, Plain, Rounding, StateDtype
from fusedopt.optimizers.moments import moment_options, update_moments
from fusedopt.reference import Group, Rule, Twin, count_step
from fusedopt.reference.arithmetic import power, sqrt
from fusedopt.reference.rule import column


def _rectification(beta2: float, step: int) -> float:
    """The factor for the variance of the second moment, and 0 while this has too few samples."""
    beta2_power = power(beta2, step)
    bias_correction2 = 1 - beta2_power
    rho_inf = 2 / (1 - beta2) - 1
    rho = rho_inf - 2 * float(step) * beta2_power / bias_correction2
    if not rho > 5:
        return 0.0
    squared = (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)
    return math.sqrt(squared) * math.sqrt(bias_correction2)


def _update(
    group: Group, scalars: dict[str, Tensor], param: Tensor, grad: Tensor, state: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    step = int(scalars["step"])
    beta1, beta2 = map(float, group["betas"])
    step_size = group["lr"] / (1 - power(beta1, step))
    factor = _rectification(beta2, step)

    param, grad, moments = update_moments(group, param, grad, state)
    direction = moments["exp_avg"]
    if factor != 0:
        step_size = step_size * factor
        direction = direction / (sqrt(moments["exp_avg_sq"]) + group["eps"])
    return param - step_size * direction, moments


def _torch_step(
    group: Group,
    params: list[Tensor],
    grads: list[Tensor],
    states: list[dict[str, Tensor]],
    fused: bool,
) -> None:
    radam(
        params,
        grads,
        column(states, "exp_avg"),
        column(states, "exp_avg_sq"),
        column(states, "step"),
        foreach=True,
        capturable=params[0].is_cuda,
        **moment_options(group),
    )


RADAM = Rule(
    "radam",
    scalars={"step": 0},
    tensors=("exp_avg", "exp_avg_sq"),
    codings={"exp_avg": "linear", "exp_avg_sq": "root"},
    advance=count_step,
    update=_update,
    twin=Twin(_torch_step),
)


class FusedRAdam(FusedOptimizer, torch.optim.RAdam):
    """RAdam (Liu et al., 2020, arXiv:1908.03265): Adam with a rectified learning rate, in one step.

    With g the unscaled and clipped gradient, m and v the moments, t the step:

        m = beta1 m + (1 - beta1) g                 m_hat = m / (1 - beta1^t)
        v = beta2 v + (1 - beta2) g^2
        rho_inf = 2 / (1 - beta2) - 1               rho = rho_inf - 2 t beta2^t / (1 - beta2^t)

    If rho > 5:

        r = sqrt((rho - 4) (rho - 2) rho_inf / ((rho_inf - 4) (rho_inf - 2) rho))
        param = param - lr * r * m_hat * sqrt(1 - beta2^t) / (sqrt(v) + eps)

    Else:

        param = param - lr * m_hat

    `decoupled_weight_decay=True` decays the parameter instead of adding to the gradient, as AdamW
    does (Loshchilov and Hutter, 2019).

    State per parameter: `step` (0-d float32), `exp_avg` and `exp_avg_sq` (shape, dtype and device
    of the parameter).

    Args:
        params: parameters, (name, parameter) pairs, or dicts of param groups.
        lr: learning rate, a number or a tensor of one.
        betas: how much of the averages of g and of g^2 stays from step to step.
        eps: keeps the denominator above 0.
        weight_decay: how much of the parameter is added to g.
        decoupled_weight_decay: decay the parameter itself, as AdamW does.
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

    rule = RADAM

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
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
            betas,
            eps,
            weight_decay,
            decoupled_weight_decay,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
        )
