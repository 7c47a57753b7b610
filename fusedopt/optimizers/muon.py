"""Muon."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.optimizer import ParamsT

from fusedopt import reference
from fusedopt.clip import AdaptiveClip
from fusedopt.core import backends
from fusedopt.core.optimizer import Backend, FusedOptimizer
from fusedopt.core.plan import Plan
from fusedopt.core.settings import MasterWeights, NonFinite, Plain, Rounding, StateDtype
from fusedopt.distributed import is_dtensor
from fusedopt.optimizers.newton_schulz import OPTIONS, Iteration, updates_of
from fusedopt.optimizers.sgd import SGD
from fusedopt.reference import Control, Group, Rule, StepOptions, distinct_params
from fusedopt.reference.formats import FORMAT_OPTIONS
from fusedopt.telemetry import PARAM_COLUMNS, Rings

DIRECTION = "direction"
NEEDED = {*OPTIONS, "params", "lr", "weight_decay"}  # of the second half


def _advance(group: Group, scalars: dict[str, Tensor]) -> dict[str, Tensor]:
    return scalars  # the second half counts the step


def _update(
    group: Group, scalars: dict[str, Tensor], param: Tensor, grad: Tensor, state: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    momentum = group["momentum"]
    share = (1 - momentum) * grad
    momentum_buffer = momentum * state["momentum_buffer"] + share
    direction = momentum * momentum_buffer + share if group["nesterov"] else momentum_buffer
    return param, {"momentum_buffer": momentum_buffer, DIRECTION: direction}


MUON = Rule(
    "muon",
    scalars={},
    tensors=("momentum_buffer",),
    scratch=(DIRECTION,),
    advance=_advance,
    update=_update,
    counter="momentum_steps",
    any_sign=("ns_coefficients",),
    counts={"ns_coefficients": 3},
)


@dataclass
class Planned:
    """A plan for the second half, and the first half's plan that it belongs to.

    Attributes:
        plan: None for the reference.
        stand_ins: for every parameter, a tensor of the same memory. The second half's gradients are
            on these, so that it leaves those of the parameters alone.
        rings: one row of telemetry, or None without it.
    """

    first: Plan | None
    plan: Plan | None
    stand_ins: dict[Tensor, Tensor]
    rings: Rings | None

    def up_to_date(self) -> dict[Tensor, Tensor]:
        """The stand-ins. The first half's plan follows data that is elsewhere, and so do they."""
        for param, it in self.stand_ins.items():
            if it.data_ptr() != param.data_ptr():
                it.data = param.detach()
        return self.stand_ins


@dataclass
class Second:
    """A second half: SGD's groups, as the options were before the first half, and the plan."""

    groups: list[Group]
    planned: Planned | None = None


class SecondHalf(FusedOptimizer):
    """The end of Muon's step: orthogonalize the directions, and apply them.

    The kernels of the first half measure, unscale, clip, and skip or write the directions. Those
    of the second half are SGD's. They read the decision of the first half as a scaler's
    `found_inf`, so that a skip changes nothing and nothing waits.
    """

    def _step_options(self, mode: NonFinite) -> StepOptions:
        """The last call before the first half. The second half takes the options from here.

        Nothing that the first half calls may change them, and none may be refused after it.
        """
        own = self._own
        groups: list[Group] = own["param_groups"] if own["ranks"] is None else own["view"].groups
        if all(group.keys() >= NEEDED for group in groups):  # else the step says what is missing
            known: Second | None = own["second_half"]
            planned = None if known is None else known.planned
            own["second_half"] = Second([*map(_as_sgd, groups, range(len(groups)))], planned)
        return super()._step_options(mode)

    def _end_step(self, mode: NonFinite, options: StepOptions, control: Tensor) -> None:
        host_knows = mode == "raise" or control.device.type == "cpu"
        if not (host_knows and control[Control.STEP_SKIPPED]):
            with self._lock:
                self._apply_directions(control)
        super()._end_step(mode, options, control)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _apply_directions(self, control: Tensor) -> None:
        second: Second = self._own["second_half"]
        scratch = self._own["scratch"]
        directions = [
            (group["iteration"], param, scratch[param][DIRECTION])
            for group, param in distinct_params(second.groups)
            if param.grad is not None
        ]
        if not directions:
            return
        skip = control[Control.STEP_SKIPPED].to(torch.float32)
        options = StepOptions(math.inf, False, False, None, skip)
        updates = dict(updates_of(directions))
        planned = self._take_second_step(second, updates, options, torch.zeros_like(control))
        if self._rings is not None and planned.rings is not None:
            self._record_updates(self._rings, planned.rings, control)

    def _take_second_step(
        self, second: Second, updates: dict[Tensor, Tensor], options: StepOptions, control: Tensor
    ) -> Planned:
        """A step of SGD by a plan of its own, which is made anew with that of the first half."""
        planned = second.planned
        if planned is not None and planned.plan is not None and planned.first is self._plan:
            stand_ins = planned.up_to_date()
        else:
            planned = None
            stand_ins = {param: param.detach() for _, param in distinct_params(second.groups)}
        groups = [
            {**group, "params": [stand_ins[param] for param in group["params"]]}
            for group in second.groups
        ]
        with lent_grads({stand_ins[param]: update for param, update in updates.items()}):
            if planned is not None and self._stepped(planned, groups, options, control):
                return planned
            planned = second.planned = self._plan_second_half(groups, stand_ins)
            if not self._stepped(planned, groups, options, control):
                raise RuntimeError("fusedopt: a new plan doesn't fit its parameters; please report")
        return planned

    def _stepped(
        self, planned: Planned, groups: list[Group], options: StepOptions, control: Tensor
    ) -> bool:
        """Whether the plan fits; then it has stepped."""
        states, counters = self._states_of(planned.stand_ins)
        if planned.plan is not None:
            return planned.plan.step(groups, states, *options.for_kernels(), control=control)
        reference.step(SGD, groups, states, counters, options, control, planned.rings)
        return True

    def _plan_second_half(self, groups: list[Group], stand_ins: dict[Tensor, Tensor]) -> Planned:
        devices = [param.device for param in stand_ins]
        backend = backends.choose(self._backend, devices, self._only_exact())
        rings = None if self._rings is None else Rings(1)
        if rings is not None:
            rings.resize(groups)
        tensors = [] if rings is None else rings.tensors()
        states, counters = self._states_of(stand_ins)
        plan = backends.new_plan(backend, SGD, groups, states, counters, tensors, {})
        return Planned(self._plan, plan, stand_ins, rings)

    def _states_of(self, stand_ins: dict[Tensor, Tensor]) -> tuple[Any, dict[Tensor, Tensor]]:
        """States and counters by stand-in."""
        states, counters = self.state, self._provisional_state.counters
        return (
            {it: states[param] for param, it in stand_ins.items() if param in states},
            {it: counters[param] for param, it in stand_ins.items() if param in counters},
        )

    @staticmethod
    def _record_updates(rings: Rings, seconds: Rings, control: Tensor) -> None:
        """The first half has changed no parameter: its row gets the second half's `update_norm`."""
        column = PARAM_COLUMNS.index("update_norm")
        row = (control[Control.STEPS] - 1).remainder(rings.size).long().reshape(1)
        for device, ring in rings.params.items():
            found = seconds.params[device][:, :, column]
            ring[:, :, column].index_copy_(0, row.to(device), found)

    def _check_layout(self, param: Any, name: str) -> None:
        super()._check_layout(param, name)
        if not torch.nn.parameter.is_lazy(param) and param.dim() != 2:
            raise ValueError(
                f"{name} has shape {tuple(param.shape)}; {type(self).__name__} expects matrices "
                "(2 dimensions): give all others to another optimizer, FusedAdamW for example"
            )
        if is_dtensor(param):
            raise ValueError(
                f"{name} is a DTensor; {type(self).__name__} orthogonalizes whole matrices: "
                "expected plain parameters, as with DDP. shard_states deals them over ranks"
            )


class FusedMuon(SecondHalf, torch.optim.Muon):
    """Muon, with check, clipping and momentum in one step, and weight decay and update in another.

    With g the unscaled and clipped gradient of a matrix, and b the momentum:

        b = momentum b + (1 - momentum) g
        d = momentum b + (1 - momentum) g if nesterov else b
        param = param - lr weight_decay param - lr ratio orthogonalized(d)

    Newton and Schulz's iteration orthogonalizes d in bfloat16, as `torch.optim.Muon` does, for
    matrices of equal shape together. It consists of torch's matrix products. They round differently
    on other devices, and so do the parameters of this class: only g, b, d and the decision have the
    same bits on all backends.

    It is for the matrices of hidden layers. Give embeddings, the last layer, norms and biases to
    `FusedAdamW`, and call `fusedopt.step_together([muon, adamw])` for one norm and one decision.

    State per parameter: `momentum_buffer` (shape, dtype and device of the parameter). As much
    memory again holds d.

    Args:
        params: matrices, (name, matrix) pairs, or dicts of param groups.
        lr: learning rate, a number or a tensor of one.
        weight_decay: by how much the parameter shrinks, as a share of lr.
        momentum: how much of the buffer stays from step to step.
        nesterov: look ahead by one step of the momentum.
        ns_coefficients: of x, x^3 and x^5 in a step of the iteration.
        eps: the smallest norm that d is divided by before the iteration.
        ns_steps: how many steps the iteration has, from 0 to 99.
        adjust_lr_fn: the ratio for a matrix of A rows and B columns. None, "original":
            sqrt(max(1, A / B)). "match_rms_adamw": 0.2 sqrt(max(A, B)), with which a learning rate
            that suits AdamW suits Muon.
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
        state_dtype: torch.float32 or torch.bfloat16; None: the states have the parameter's.
        rounding: "nearest", "stochastic", or None: of second moments at random, else to nearest.
        seed: of the random rounding.

    `FusedOptimizer` says more of these twelve, and of what is refused.
    """

    rule = MUON

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
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
            weight_decay,
            momentum,
            nesterov,
            ns_coefficients,
            eps,
            ns_steps,
            adjust_lr_fn,
        )


def _as_sgd(group: Group, index: int) -> Group:
    """A group of the second half: SGD's weight decay without momentum is Muon's."""
    formats = {key: group[key] for key in FORMAT_OPTIONS if key in group}
    return {
        "params": group["params"],
        "lr": group["lr"],
        "momentum": 0.0,
        "dampening": 0.0,
        "weight_decay": group["weight_decay"],
        "nesterov": False,
        "maximize": False,
        "iteration": Iteration.of(group, f"param group {index}'s "),
        **formats,
    }


@contextmanager
def lent_grads(grads: dict[Tensor, Tensor]) -> Iterator[None]:
    """Gives tensors gradients for a while."""
    try:
        for tensor, grad in grads.items():
            tensor.grad = grad
        yield
    finally:
        for tensor in grads:
            tensor.grad = None
