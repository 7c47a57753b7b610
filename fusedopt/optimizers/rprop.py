"""Resilient backpropagation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.optimizer import ParamsT
from torch.optim.rprop import rprop

from fusedopt.clip import AdaptiveClip
from fusedopt.core.optimizer import Backend, FusedOptimizer
from fusedopt.core.settings import MasterWeights, NonFinite, Plain, Rounding, StateDtype
from fusedopt.reference import Group, Rule, Twin, count_step
from fusedopt.reference.arithmetic import sign
from fusedopt.reference.rule import column


def _update(
    group: Group, scalars: dict[str, Tensor], param: Tensor, grad: Tensor, state: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    eta_minus, eta_plus = map(float, group["etas"])
    smallest, largest = map(float, group["step_sizes"])
    product = grad * state["prev"]
    factor = torch.ones_like(grad).masked_fill(product > 0, eta_plus)
    factor = factor.masked_fill(product < 0, eta_minus)
    step_size = (state["step_size"] * factor).clamp(smallest, largest)
    prev = grad.masked_fill(product < 0, 0.0)
    return param - sign(prev) * step_size, {"prev": prev, "step_size": step_size}


def _torch_step(
    group: Group,
    params: list[Tensor],
    grads: list[Tensor],
    states: list[dict[str, Tensor]],
    fused: bool,
) -> None:
    eta_minus, eta_plus = map(float, group["etas"])
    smallest, largest = map(float, group["step_sizes"])
    rprop(
        params,
        grads,
        column(states, "prev"),
        column(states, "step_size"),
        column(states, "step"),
        foreach=True,
        capturable=params[0].is_cuda,
        maximize=group["maximize"],
        step_size_min=smallest,
        step_size_max=largest,
        etaminus=eta_minus,
        etaplus=eta_plus,
    )


RPROP = Rule(
    "rprop",
    scalars={"step": 0},
    tensors=("prev", "step_size"),
    first_values={"step_size": "lr"},
    advance=count_step,
    update=_update,
    any_sign=("etas", "step_sizes"),
    counts={"etas": 2, "step_sizes": 2},
    twin=Twin(_torch_step),
)


class FusedRprop(FusedOptimizer, torch.optim.Rprop):
    """Resilient backpropagation (Riedmiller and Braun, 1993), in one step.

    With g the unscaled gradient, p the gradient of the step before, s the step sizes:

        s = min(max(s * (etas[1] if g p > 0, etas[0] if g p < 0, else 1), smallest), largest)
        p = 0 if g p < 0, else g
        param = param - s sign(p)

    Only signs of g count, so clipping changes nothing. State per parameter: `step` (0-d float32),
    `prev` (p) and `step_size` (s), of shape, dtype and device of the parameter.

    Args:
        params: parameters, (name, parameter) pairs, or dicts of param groups.
        lr: the step sizes that training starts from, a number or a tensor of one.
        etas: the factors by which a step size shrinks and grows.
        step_sizes: the smallest and the largest step size.
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

    rule = RPROP

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        etas: tuple[float, float] = (0.5, 1.2),
        step_sizes: tuple[float, float] = (1e-6, 50),
        *,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
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
            etas,
            step_sizes,
            capturable=capturable,
            foreach=foreach,
            maximize=maximize,
            differentiable=differentiable,
        )
