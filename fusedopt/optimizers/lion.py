"""Lion."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.optimizer import ParamsT

from fusedopt.clip import AdaptiveClip
from fusedopt.core.optimizer import Backend
from fusedopt.core.settings import MasterWeights, NonFinite, Plain, Rounding, StateDtype
from fusedopt.optimizers.cautious import CautiousOption, agrees, inverse_share, rule_choice
from fusedopt.optimizers.own import OwnOptimizer
from fusedopt.reference import Group, Rule, Trust
from fusedopt.reference.arithmetic import sign


def _advance(group: Group, scalars: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"steps": scalars["steps"] + 1}


def _direction(group: Group, grad: Tensor, state: dict[str, Tensor]) -> Tensor:
    beta1 = float(group["betas"][0])
    return sign(beta1 * state["exp_avg"] + (1 - beta1) * grad)


def _new_states(group: Group, grad: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
    beta2 = float(group["betas"][1])
    return {"exp_avg": beta2 * state["exp_avg"] + (1 - beta2) * grad}


def _decayed(group: Group, param: Tensor) -> Tensor:
    return param * (1 - group["lr"] * group["weight_decay"])


def _update(
    group: Group, scalars: dict[str, Tensor], param: Tensor, grad: Tensor, state: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    param = _decayed(group, param) - group["lr"] * _direction(group, grad, state)
    return param, _new_states(group, grad, state)


def _cautious_update(
    group: Group,
    scalars: dict[str, Tensor],
    param: Tensor,
    grad: Tensor,
    state: dict[str, Tensor],
    ratio: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    direction = _direction(group, grad, state)
    direction = direction * agrees(direction, grad)
    param = _decayed(group, param) - group["lr"] * ratio * direction
    return param, _new_states(group, grad, state)


def _cautious_term(
    group: Group, scalars: dict[str, Tensor], param: Tensor, grad: Tensor, state: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    return agrees(_direction(group, grad, state), grad), {}


LION = Rule(
    "lion",
    scalars={},
    tensors=("exp_avg",),
    codings={"exp_avg": "linear"},
    advance=_advance,
    update=_update,
    counter="steps",
)


CAUTIOUS_LION = replace(
    LION,
    name="cautious_lion",
    update=_cautious_update,
    trust=Trust(_cautious_term, inverse_share, reads=("exp_avg",), reads_param=False),
)


class FusedLion(CautiousOption, OwnOptimizer):
    """Lion (Chen et al., 2023, arXiv:2302.06675), with check, clipping and update in one step.

    With g the unscaled and clipped gradient, and m the average:

        param = (1 - lr weight_decay) param - lr sign(betas[0] m + (1 - betas[0]) g)
        m = betas[1] m + (1 - betas[1]) g

    With `cautious=True` (Liang et al., 2024, arXiv:2411.16085) an element whose direction, the sign
    above, has another sign than its gradient doesn't move, and the others move farther. With the
    mean over the elements of the parameter tensor:

        mask = 1 where sign g > 0, else 0
        param = (1 - lr weight_decay) param - lr sign mask / max(mean(mask), 0.001)

    The mean takes a pass over g and m before the update. So a step moves 28 bytes per float32
    parameter, and 32 with clipping, instead of 20 and 24.

    State per parameter: `exp_avg` (m), of shape, dtype and device of the parameter. It is that of
    lion-pytorch.

    Args:
        params: parameters, (name, parameter) pairs, or dicts of param groups.
        lr: learning rate, a number or a tensor of one.
        betas: how much of m there is in the direction, and how much of m stays.
        weight_decay: by how much the parameter shrinks, as a share of lr.
        foreach, capturable: accepted as torch's classes do, and without effect: the step is always
            fused and capturable.
        maximize: go up the gradient.
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
        ValueError: an option is out of range. Or, with `cautious=True`, a parameter is a part of a
            tensor that is sharded over several ranks (a DTensor, or a flat parameter of
            FullyShardedDataParallel): no rank knows the tensor's mean. `shard_states` deals whole
            tensors over ranks.
    """

    rule = rule_choice(LION, CAUTIOUS_LION)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
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
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults)
