"""Adam and AdamW."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.adam import adam
from torch.optim.optimizer import ParamsT

from fusedopt.clip import AdaptiveClip
from fusedopt.core.optimizer import Backend, FusedOptimizer
from fusedopt.core.settings import MasterWeights, NonFinite, Plain, Rounding, StateDtype
from fusedopt.optimizers.cautious import CautiousOption, agrees, inverse_share, rule_choice
from fusedopt.optimizers.moments import moment_options, new_exp_avg, update_moments
from fusedopt.reference import Group, Rule, Trust, Twin, count_step
from fusedopt.reference.arithmetic import power, sqrt
from fusedopt.reference.rule import column


def _direction(
    group: Group, scalars: dict[str, Tensor], param: Tensor, grad: Tensor, state: dict[str, Tensor]
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The parameter after weight decay, the direction of its update, and the new states."""
    param, grad, new_state = update_moments(group, param, grad, state)
    second_moment = new_state["exp_avg_sq"]
    if group["amsgrad"]:
        largest = state["max_exp_avg_sq"]
        second_moment = torch.where(largest > second_moment, largest, second_moment)
        new_state["max_exp_avg_sq"] = second_moment
    bias_correction2 = 1 - power(float(group["betas"][1]), int(scalars["step"]))
    inv_sqrt_bias_correction2 = 1 / math.sqrt(bias_correction2)
    eps = group["eps"] * inv_sqrt_bias_correction2 if group.get("eps_hat") else group["eps"]
    denom = sqrt(second_moment) * inv_sqrt_bias_correction2 + eps
    return param, new_state["exp_avg"] / denom, new_state


def _step_size(group: Group, scalars: dict[str, Tensor]) -> float:
    return group["lr"] / (1 - power(float(group["betas"][0]), int(scalars["step"])))


def _update(
    group: Group, scalars: dict[str, Tensor], param: Tensor, grad: Tensor, state: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    param, direction, new_state = _direction(group, scalars, param, grad, state)
    return param - _step_size(group, scalars) * direction, new_state


def _cautious_update(
    group: Group,
    scalars: dict[str, Tensor],
    param: Tensor,
    grad: Tensor,
    state: dict[str, Tensor],
    ratio: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    param, direction, new_state = _direction(group, scalars, param, grad, state)
    direction = direction * agrees(new_state["exp_avg"], grad)
    return param - _step_size(group, scalars) * ratio * direction, new_state


def _cautious_term(
    group: Group, scalars: dict[str, Tensor], param: Tensor, grad: Tensor, state: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    return agrees(new_exp_avg(group, grad, state), grad), {}


def _torch_step(
    group: Group,
    params: list[Tensor],
    grads: list[Tensor],
    states: list[dict[str, Tensor]],
    fused: bool,
) -> None:
    adam(
        params,
        grads,
        column(states, "exp_avg"),
        column(states, "exp_avg_sq"),
        column(states, "max_exp_avg_sq") if group["amsgrad"] else [],
        column(states, "step"),
        foreach=not fused,
        fused=fused,
        capturable=params[0].is_cuda,
        **moment_options(group),
        amsgrad=group["amsgrad"],
    )


ADAM = Rule(
    "adam",
    scalars={"step": 0},
    tensors=("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    codings={"exp_avg": "linear", "exp_avg_sq": "root"},
    optional={"max_exp_avg_sq": lambda group: group["amsgrad"]},
    advance=count_step,
    update=_update,
    twin=Twin(
        _torch_step,
        fused_dtypes=(torch.float32, torch.float64, torch.bfloat16, torch.float16),
        suits=lambda group: not group.get("eps_hat"),
    ),
)


CAUTIOUS_ADAMW = replace(
    ADAM,
    name="cautious_adamw",
    update=_cautious_update,
    twin=None,
    trust=Trust(_cautious_term, inverse_share, reads=("exp_avg",), reads_param=False),
)


class FusedAdam(FusedOptimizer, torch.optim.Adam):
    """Adam (Kingma and Ba, 2015, arXiv:1412.6980), with check, clipping and update in one step.

    With g the unscaled and clipped gradient, m and v the moments, t the step:

        m = beta1 m + (1 - beta1) g                 m_hat = m / (1 - beta1^t)
        v = beta2 v + (1 - beta2) g^2               v_hat = v / (1 - beta2^t)
        param = param - lr * m_hat / (sqrt(v_hat) + eps)

    `amsgrad=True` takes the largest v so far (Reddi et al., 2018), `decoupled_weight_decay=True`
    decays the parameter instead of adding to the gradient (Loshchilov and Hutter, 2019).

    State per parameter: `step` (0-d float32), `exp_avg`, `exp_avg_sq` and, with amsgrad,
    `max_exp_avg_sq` (shape, dtype and device of the parameter).

    Args:
        params: parameters, (name, parameter) pairs, or dicts of param groups.
        lr: learning rate, a number or a tensor of one.
        betas: how much of the averages of g and of g^2 stays from step to step.
        eps: keeps the denominator above 0.
        weight_decay: how much of the parameter is added to g.
        amsgrad: take the largest v so far.
        foreach, capturable, fused: accepted as torch's, and without effect: the step is always
            fused and capturable.
        maximize: go up the gradient.
        differentiable: True is refused: autograd can't look into a fused step.
        decoupled_weight_decay: decay the parameter itself, as AdamW does.
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

    rule = ADAM

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
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
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )


class FusedAdamW(CautiousOption, torch.optim.AdamW):
    """AdamW (Loshchilov and Hutter, 2019, arXiv:1711.05101): Adam with decoupled weight decay.

    As `FusedAdam`, except that the parameter is first multiplied by `1 - lr * weight_decay`.

    With `cautious=True` (Liang et al., 2024, arXiv:2411.16085) an element whose m has another sign
    than its gradient doesn't move, and the others move farther. With the mean over the elements of
    the parameter tensor:

        mask = 1 where m g > 0, else 0
        param = param - lr * m_hat / (sqrt(v_hat) + eps) * mask / max(mean(mask), 0.001)

    Weight decay is as without it, and so are the states: their checkpoints are AdamW's. The mean
    takes a pass over g and m before the update. So a step moves 36 bytes per float32 parameter, and
    40 with clipping, instead of 28 and 32.

    Args:
        params: parameters, (name, parameter) pairs, or dicts of param groups.
        lr: learning rate, a number or a tensor of one.
        betas: how much of the averages of g and of g^2 stays from step to step.
        eps: keeps the denominator above 0.
        weight_decay: the parameter is multiplied by 1 - lr * weight_decay.
        amsgrad: take the largest v so far.
        maximize: go up the gradient.
        foreach, capturable, fused: accepted as torch's, and without effect: the step is always
            fused and capturable.
        differentiable: True is refused: autograd can't look into a fused step.
        cautious: move only the elements whose update agrees with their gradient. An attribute; it
            may be changed between steps, and is not taken from a checkpoint.
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

    `FusedOptimizer` says more of the last twelve, and of what is refused.

    Raises:
        ValueError: with `cautious=True`, a parameter is a part of a tensor that is sharded over
            several ranks (a DTensor, or a flat parameter of FullyShardedDataParallel): no rank
            knows the tensor's mean. `shard_states` deals whole tensors over ranks.
    """

    rule = rule_choice(ADAM, CAUTIOUS_ADAMW)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        cautious: bool = False,
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
        self.cautious = cautious
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
