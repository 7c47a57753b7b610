"""LAMB."""

from __future__ import annotations

import math

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.optimizer import ParamsT

from fusedopt.clip import AdaptiveClip
from fusedopt.core.optimizer import Backend
from fusedopt.core.settings import MasterWeights, NonFinite, Plain, Rounding, StateDtype
from fusedopt.optimizers.moments import new_moments
from fusedopt.optimizers.own import OwnOptimizer
from fusedopt.reference import Group, Rule, Trust, TrustNorms, count_step
from fusedopt.reference.arithmetic import power, sqrt
from fusedopt.reference.rule import with_l2


def _direction(
    group: Group, scalars: dict[str, Tensor], param: Tensor, states: dict[str, Tensor]
) -> Tensor:
    beta1, beta2 = map(float, group["betas"])
    inv_bias_correction1 = inv_sqrt_bias_correction2 = 1.0
    if group["bias_correction"]:
        step = int(scalars["step"])
        inv_bias_correction1 = 1 / (1 - power(beta1, step))
        inv_sqrt_bias_correction2 = 1 / math.sqrt(1 - power(beta2, step))
    denom = sqrt(states["exp_avg_sq"]) * inv_sqrt_bias_correction2 + group["eps"]
    return with_l2(group, param, states["exp_avg"] * inv_bias_correction1 / denom)


def _term(
    group: Group, scalars: dict[str, Tensor], param: Tensor, grad: Tensor, state: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    new_states = new_moments(group, grad, state)
    return _direction(group, scalars, param, new_states), new_states


def _ratio(group: Group, norms: TrustNorms) -> float:
    if group["weight_decay"] == 0 and not group["always_adapt"]:
        return 1.0
    if not (norms.params > 0 and norms.terms > 0):
        return 1.0
    ratio = norms.params / norms.terms
    return 1.0 if group["trust_clip"] and ratio > 1 else ratio


def _update(
    group: Group,
    scalars: dict[str, Tensor],
    param: Tensor,
    grad: Tensor,
    state: dict[str, Tensor],
    ratio: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    return param - group["lr"] * ratio * _direction(group, scalars, param, state), {}


LAMB = Rule(
    "lamb",
    scalars={"step": 0},
    tensors=("exp_avg", "exp_avg_sq"),
    codings={"exp_avg": "linear", "exp_avg_sq": "root"},
    advance=count_step,
    update=_update,
    trust=Trust(_term, _ratio, states=("exp_avg", "exp_avg_sq")),
)


class FusedLAMB(OwnOptimizer):
    """LAMB (You et al., 2020, arXiv:1904.00962), in one step.

    Adam with a learning rate for each parameter tensor. With g the unscaled and clipped gradient, p
    the parameter, m and v the averages, t the step:

        m = betas[0] m + (1 - betas[0]) g
        v = betas[1] v + (1 - betas[1]) g^2
        u = m / (1 - betas[0]^t) / (sqrt(v / (1 - betas[1]^t)) + eps) + weight_decay p
        p = p - lr |p| / |u| u

    The ratio |p| / |u| is 1 where |p| or |u| is 0. It is also 1 in a param group without weight
    decay, unless `always_adapt` is set: so biases and norms can have a group of their own, with
    `weight_decay=0`. The paper's bounds of |p|, its function phi, are not applied.

    These are the formula and the defaults of Apex's `FusedLAMB`, where `always_adapt` is
    `use_nvlamb`, and of timm's `Lamb`. Both clip the global norm to 1 by default: here it is
    `max_grad_norm=1.0`. Apex's `adam_w_mode=False` and `grad_averaging=False` are not there.

    A step moves 40 bytes per float32 parameter, and 44 with clipping: two passes read the moments.

    State per parameter: `step` (0-d float32), `exp_avg` (m) and `exp_avg_sq` (v), of shape, dtype
    and device of the parameter.

    Args:
        params: parameters, (name, parameter) pairs, or dicts of param groups. They must be whole
            tensors.
        lr: learning rate, a number or a tensor of one.
        betas: how much of m and of v stays from step to step.
        eps: added to the root.
        weight_decay: how much of the parameter is added to u.
        bias_correction: False: leave the divisors 1 - betas^t out.
        trust_clip: take min(ratio, 1) as the ratio, as timm's option does.
        always_adapt: also adapt the learning rate of parameters without weight decay.
        foreach, capturable: accepted as torch's classes do, and without effect: the step is always
            fused and capturable.
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

    Raises:
        ValueError: an option is out of range. Or a parameter is a part of a tensor that is sharded
            over several ranks (a DTensor, or a flat parameter of FullyShardedDataParallel): no rank
            knows the tensor's norm. `shard_states` deals whole tensors over ranks.
    """

    rule = LAMB

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        bias_correction: bool = True,
        trust_clip: bool = False,
        always_adapt: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
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
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "trust_clip": trust_clip,
            "always_adapt": always_adapt,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults)
