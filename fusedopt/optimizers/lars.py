"""LARS."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.optimizer import ParamsT

from fusedopt.clip import AdaptiveClip
from fusedopt.core.optimizer import Backend
from fusedopt.core.settings import MasterWeights, NonFinite, Plain, Rounding, StateDtype
from fusedopt.optimizers.own import OwnOptimizer
from fusedopt.optimizers.sgd import count_momentum, with_momentum
from fusedopt.reference import Group, Rule, Trust, TrustNorms
from fusedopt.reference.rule import with_l2


def _term(
    group: Group, scalars: dict[str, Tensor], param: Tensor, grad: Tensor, state: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    return grad, {}


def _ratio(group: Group, norms: TrustNorms) -> float:
    weight_decay = group["weight_decay"]
    if weight_decay == 0 and not group["always_adapt"]:
        return 1.0
    if not (norms.params > 0 and norms.terms > 0):
        return 1.0
    decayed = norms.terms + weight_decay * norms.params + group["eps"]
    ratio = group["trust_coefficient"] * norms.params / decayed
    if not group["trust_clip"]:
        return ratio
    return ratio / group["lr"] if ratio < group["lr"] else 1.0


def _update(
    group: Group,
    scalars: dict[str, Tensor],
    param: Tensor,
    grad: Tensor,
    state: dict[str, Tensor],
    ratio: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    grad = with_l2(group, param, grad) * ratio
    direction, new_state = with_momentum(group, scalars, grad, state)
    return param - group["lr"] * direction, new_state


LARS = Rule(
    "lars",
    scalars={},
    tensors=("momentum_buffer",),
    codings={"momentum_buffer": "linear"},
    optional={"momentum_buffer": lambda group: group["momentum"] != 0},
    advance=count_momentum,
    update=_update,
    trust=Trust(_term, _ratio),
    any_sign=("dampening",),
    counter="momentum_steps",
)


class FusedLARS(OwnOptimizer):
    """LARS (You, Gitman and Ginsburg, 2017, arXiv:1708.03888), in one step.

    Gradient descent with a learning rate for each parameter tensor. With g the unscaled and clipped
    gradient, p the parameter and b the momentum, which is the first d itself:

        ratio = trust_coefficient |p| / (|g| + weight_decay |p| + eps)
        d = ratio (g + weight_decay p)
        b = momentum b + (1 - dampening) d
        p = p - lr b

    The ratio is 1 where |p| or |g| is 0. It is also 1 in a param group without weight decay, unless
    `always_adapt` is set: so biases and norms can have a group of their own, with
    `weight_decay=0`. Note that `weight_decay` is 0 by default.

    These are the formula and the options of timm's `Lars`, which calls `trust_coefficient`
    `trust_coeff`; Apex's `LARC` has the same ratio. `lr` is a factor of b, as in torch's SGD. The
    paper multiplies g by it instead, which is the same for a constant `lr`.

    State per parameter: with momentum `momentum_buffer` (shape, dtype and device of the parameter),
    else none.

    Args:
        params: parameters, (name, parameter) pairs, or dicts of param groups. They must be whole
            tensors.
        lr: learning rate, a number or a tensor of one.
        momentum: how much of the buffer stays from step to step; 0: there is none.
        dampening: how much of d does not enter the buffer, from its second step on.
        weight_decay: how much of the parameter is added to g.
        nesterov: take d + momentum b in place of b; without a momentum, or with dampening, it is
            refused.
        trust_coefficient: the ratio of |p| and |d|, where eps plays no part.
        eps: added to the norms in the ratio.
        trust_clip: take min(ratio / lr, 1) as the ratio, so that lr is the largest learning rate,
            as Apex's `LARC` does.
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

    rule = LARS

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        trust_coefficient: float = 0.001,
        eps: float = 1e-8,
        trust_clip: bool = False,
        always_adapt: bool = False,
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
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError(
                f"nesterov=True with momentum={momentum} and dampening={dampening}; expected a "
                "momentum > 0 and no dampening"
            )
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "trust_coefficient": trust_coefficient,
            "eps": eps,
            "trust_clip": trust_clip,
            "always_adapt": always_adapt,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            if "trust_coeff" in group:  # timm's name
                group["trust_coefficient"] = group.pop("trust_coeff")
            group.setdefault("nesterov", False)
