"""NAdam."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.nadam import nadam
from torch.optim.optimizer import ParamsT

from fusedopt.clip import AdaptiveClip
from fusedopt.core.optimizer import Backend, FusedOptimizer
from fusedopt.core.settings import MasterWeights, NonFinite, Plain, Rounding, StateDtype
from fusedopt.optimizers.moments import moment_options, update_moments
from fusedopt.reference import Group, Rule, Twin
from fusedopt.reference.arithmetic import power, sqrt
from fusedopt.reference.rule import column


def _mu(group: Group, step: int) -> float:
    """The momentum of a step. The host's libm computes the base, repeated squaring the power."""
    base = 0.96 ** float(group["momentum_decay"])
    return float(group["betas"][0]) * (1 - 0.5 * power(base, step))


def _advance(group: Group, scalars: dict[str, Tensor]) -> dict[str, Tensor]:
    step = scalars["step"] + 1
    return {"step": step, "mu_product": scalars["mu_product"] * _mu(group, int(step))}


def _update(
    group: Group, scalars: dict[str, Tensor], param: Tensor, grad: Tensor, state: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    step, mu_product = int(scalars["step"]), float(scalars["mu_product"])
    lr, beta2 = group["lr"], float(group["betas"][1])
    mu, mu_next = _mu(group, step), _mu(group, step + 1)
    grad_step_size = lr * (1 - mu) / (1 - mu_product)
    exp_avg_step_size = lr * mu_next / (1 - mu_product * mu_next)
    bias_correction2 = 1 - power(beta2, step)

    param, grad, moments = update_moments(group, param, grad, state)
    denom = sqrt(moments["exp_avg_sq"]) * (1 / math.sqrt(bias_correction2)) + group["eps"]
    direction = (grad_step_size * grad + exp_avg_step_size * moments["exp_avg"]) / denom
    return param - direction, moments


def _torch_step(
    group: Group,
    params: list[Tensor],
    grads: list[Tensor],
    states: list[dict[str, Tensor]],
    fused: bool,
) -> None:
    nadam(
        params,
        grads,
        column(states, "exp_avg"),
        column(states, "exp_avg_sq"),
        column(states, "mu_product"),
        column(states, "step"),
        foreach=True,
        capturable=params[0].is_cuda,
        **moment_options(group),
        momentum_decay=float(group["momentum_decay"]),
    )


NADAM = Rule(
    "nadam",
    scalars={"step": 0, "mu_product": 1},
    tensors=("exp_avg", "exp_avg_sq"),
    codings={"exp_avg": "linear", "exp_avg_sq": "root"},
    advance=_advance,
    update=_update,
    twin=Twin(_torch_step),
)


class FusedNAdam(FusedOptimizer, torch.optim.NAdam):
    """NAdam (Dozat, 2016), Adam with Nesterov momentum; check, clipping and update in one step.

    With g the unscaled and clipped gradient, m and v the moments, t the step, and psi standing for
    `momentum_decay`:

        mu_t = beta1 (1 - 0.96^(t psi) / 2)
        m = beta1 m + (1 - beta1) g
        v = beta2 v + (1 - beta2) g^2               v_hat = v / (1 - beta2^t)
        m_hat = mu_{t+1} m / (1 - mu_1 ... mu_{t+1}) + (1 - mu_t) g / (1 - mu_1 ... mu_t)
        param = param - lr * m_hat / (sqrt(v_hat) + eps)

    `decoupled_weight_decay=True` decays the parameter instead of adding to the gradient, as AdamW
    does (Loshchilov and Hutter, 2019).

    State per parameter: `step` and `mu_product` (0-d float32), `exp_avg` and `exp_avg_sq` (shape,
    dtype and device of the parameter).

    Args:
        params: parameters, (name, parameter) pairs, or dicts of param groups.
        lr: learning rate, a number or a tensor of one.
        betas: how much of the averages of g and of g^2 stays from step to step.
        eps: keeps the denominator above 0.
        weight_decay: how much of the parameter is added to g.
        momentum_decay: psi, by which the momentum grows to beta1.
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

    rule = NADAM

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum_decay: float = 4e-3,
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
            momentum_decay,
            decoupled_weight_decay,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
        )
