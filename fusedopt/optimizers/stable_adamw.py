"""StableAdamW."""

from __future__ import annotations

import math

import torch
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


def _usual_size(group: Group, scalars: dict[str, Tensor], states: dict[str, Tensor]) -> Tensor:
    bias_correction2 = 1 - power(float(group["betas"][1]), int(scalars["step"]))
    return sqrt(states["exp_avg_sq"]) * (1 / math.sqrt(bias_correction2))


def _term(
    group: Group, scalars: dict[str, Tensor], param: Tensor, grad: Tensor, state: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    new_states = new_moments(group, grad, state)
    usual = _usual_size(group, scalars, new_states)
    return grad / torch.where(usual > group["eps"], usual, group["eps"]), new_states


def _ratio(group: Group, norms: TrustNorms) -> float:
    if norms.numel == 0:
        return 1.0
    rms = norms.terms / math.sqrt(norms.numel)
    return 1 / rms if rms > 1 else 1.0


def _update(
    group: Group,
    scalars: dict[str, Tensor],
    param: Tensor,
    grad: Tensor,
    state: dict[str, Tensor],
    ratio: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    lr = group["lr"] * ratio
    step_size = lr / (1 - power(float(group["betas"][0]), int(scalars["step"])))
    direction = state["exp_avg"] / (_usual_size(group, scalars, state) + group["eps"])
    return param * (1 - lr * group["weight_decay"]) - step_size * direction, {}


STABLE_ADAMW = Rule(
    "stable_adamw",
    scalars={"step": 0},
    tensors=("exp_avg", "exp_avg_sq"),
    codings={"exp_avg": "linear", "exp_avg_sq": "root"},
    advance=count_step,
    update=_update,
    trust=Trust(_term, _ratio, states=("exp_avg", "exp_avg_sq"), reads_param=False),
)


class FusedStableAdamW(OwnOptimizer):
    """StableAdamW (Wortsman et al., 2023, arXiv:2304.13013), in one step.

    AdamW whose learning rate is smaller for a parameter tensor whose gradients are larger than
    usual. With g the unscaled and clipped gradient, p the parameter, m and v the averages, t the
    step, w = v / (1 - betas[1]^t), and the mean over the tensor's elements:

        m = betas[0] m + (1 - betas[0]) g
        v = betas[1] v + (1 - betas[1]) g^2
        a = lr / max(1, sqrt(mean(g^2 / max(w, eps^2))))
        p = (1 - a weight_decay) p - a m / (1 - betas[0]^t) / (sqrt(w) + eps)

    The states are those of AdamW, whose checkpoints can be loaded. optimi's `StableAdamW` keeps
    w and m / (1 - betas[0]^t) in place of v and m. Its defaults are the same.

    A step moves 36 bytes per float32 parameter, and 40 with clipping: two passes read the moments.

    State per parameter: `step` (0-d float32), `exp_avg` (m) and `exp_avg_sq` (v), of shape, dtype
    and device of the parameter.

    Args:
        params: parameters, (name, parameter) pairs, or dicts of param groups. They must be whole
            tensors.
        lr: learning rate, a number or a tensor of one.
        betas: how much of m and of v stays from step to step.
        eps: added to the root.
        weight_decay: by how much the parameter shrinks, as a share of a.
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

    rule = STABLE_ADAMW

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
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
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults)
