"""Stochastic gradient descent."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.optimizer import ParamsT
from torch.optim.sgd import sgd

from fusedopt.clip import AdaptiveClip
from fusedopt.core.optimizer import Backend, FusedOptimizer
from fusedopt.core.settings import MasterWeights, NonFinite, Plain, Rounding, StateDtype
from fusedopt.reference import Group, Rule, Twin
from fusedopt.reference.rule import column, with_decay


def count_momentum(group: Group, scalars: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"momentum_steps": scalars["momentum_steps"] + 1}


def with_momentum(
    group: Group, scalars: dict[str, Tensor], grad: Tensor, state: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The direction of the update, and the new buffer if there is one. LARS shares it."""
    momentum = group["momentum"]
    if momentum == 0:
        return grad, {}
    # The buffer starts from zero, and its first gradient is not dampened.
    first = scalars["momentum_steps"] == 1
    share = -group["lr"] if group.get("lr_in_momentum") else 1.0
    grad_share = share if first else share * (1 - group["dampening"])
    momentum_buffer = momentum * state["momentum_buffer"] + grad_share * grad
    direction = momentum_buffer
    if group["nesterov"]:
        direction = share * grad + momentum * momentum_buffer
    return direction, {"momentum_buffer": momentum_buffer}


def _update(
    group: Group, scalars: dict[str, Tensor], param: Tensor, grad: Tensor, state: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    param, grad = with_decay(group, param, grad)
    direction, new_state = with_momentum(group, scalars, grad, state)
    lr = -1.0 if group.get("lr_in_momentum") and new_state else group["lr"]
    return param - lr * direction, new_state


def _torch_step(
    group: Group,
    params: list[Tensor],
    grads: list[Tensor],
    states: list[dict[str, Tensor]],
    fused: bool,
) -> None:
    """The first gradient of a buffer of zeros is not dampened: these have a call of their own."""
    counters = column(states, "momentum_steps")
    first = [False] * len(params)
    if group["momentum"] != 0 and group["dampening"] != 0:
        first = [counter.item() == 0 for counter in counters]
    one = torch.ones(())  # once: torch would make a tensor of the number for every counter
    torch._foreach_add_(counters, one, alpha=1.0)  # pyright: ignore[reportPrivateImportUsage]
    for is_first, dampening in ((True, 0.0), (False, float(group["dampening"]))):
        chosen = [index for index, value in enumerate(first) if value == is_first]
        buffers: list[Tensor | None] = [states[index].get("momentum_buffer") for index in chosen]
        sgd(
            [params[index] for index in chosen],
            [grads[index] for index in chosen],
            buffers if group["momentum"] != 0 else [None] * len(chosen),
            foreach=not fused,
            fused=fused,
            weight_decay=float(group["weight_decay"]),
            momentum=float(group["momentum"]),
            lr=float(group["lr"]),
            dampening=dampening,
            nesterov=group["nesterov"],
            maximize=group["maximize"],
        )


SGD = Rule(
    "sgd",
    scalars={},
    tensors=("momentum_buffer",),
    codings={"momentum_buffer": "linear"},
    optional={"momentum_buffer": lambda group: group["momentum"] != 0},
    advance=count_momentum,
    update=_update,
    any_sign=("dampening",),
    counter="momentum_steps",
    # On a CPU, torch's fused SGD leaves wrong momentum of 16-bit parameters (2.13).
    twin=Twin(
        _torch_step,
        fused_dtypes=(torch.float32, torch.float64),
        suits=lambda group: (
            not (group.get("lr_in_momentum") or group.get("decoupled_weight_decay"))
        ),
    ),
)


class FusedSGD(FusedOptimizer, torch.optim.SGD):
    """Gradient descent, with check, clipping and update in one step.

    With g the unscaled and clipped gradient, and b the momentum (Polyak, 1964), which is g itself
    at the first step:

        b = momentum b + (1 - dampening) g
        param = param - lr * b

    `nesterov=True` takes g + momentum b in place of b (Sutskever et al., 2013). Without momentum,
    b is g.

    State per parameter: with momentum `momentum_buffer` (shape, dtype and device of the parameter),
    else none.

    Args:
        params: parameters, (name, parameter) pairs, or dicts of param groups.
        lr: learning rate, a number or a tensor of one.
        momentum: how much of the buffer stays from step to step; 0: there is none.
        dampening: how much of g does not enter the buffer, from its second step on.
        weight_decay: how much of the parameter is added to g.
        nesterov: look ahead by one step of the momentum.
        maximize: go up the gradient.
        foreach, fused: accepted as torch's, and without effect: the step is always fused and
            capturable.
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

    rule = SGD

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
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
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )
