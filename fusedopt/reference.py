"""The step in plain torch: the specification that every compiled backend matches in bits.

Every operation is a single one in float32 (float64 for float64 parameters), rounded once: no fused
multiply-add, no `alpha=`, no `lerp`. Scalars are computed in float64 and rounded once. The order of
every sum is a part of the specification: see `fusedopt.norms`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fusedopt import norms
from fusedopt.arithmetic import as_read, compute_dtype

if TYPE_CHECKING:
    from fusedopt.clip import AdaptiveClip
    from fusedopt.telemetry import Rings

Group = dict[str, Any]


@dataclass(frozen=True)
class Rule:
    """An optimizer's formula, and what it keeps for every parameter.

    `scalars` are its 0-d float32 states with the values that they start from, `states(group)` the
    names of those shaped as the parameter. `update(group, scalars, param, grad, states)` returns
    the new parameter and the new states; all tensors come and go in the type that is computed in.
    `advance(group, scalars)` returns the scalars of this step, which `update` is given.

    `counter` names the scalar that counts a state's steps. Where torch's twin doesn't keep one, it
    is not among `scalars` and is kept apart from the state; of a loaded state it starts from 1.
    """

    name: str
    scalars: dict[str, float]
    states: Callable[[Group], tuple[str, ...]]
    advance: Callable[[Group, dict[str, Tensor]], dict[str, Tensor]]
    update: Callable[
        [Group, dict[str, Tensor], Tensor, Tensor, dict[str, Tensor]],
        tuple[Tensor, dict[str, Tensor]],
    ]
    counter: str = "step"

    @property
    def counts_apart(self) -> bool:
        return self.counter not in self.scalars


def count_step(group: Group, scalars: dict[str, Tensor]) -> dict[str, Tensor]:
    """`advance` of a rule whose only scalar is the number of its steps."""
    return {"step": scalars["step"] + 1}


class Request(NamedTuple):
    """What one call of `step()` asks for, beside the hyperparameters in the groups."""

    max_grad_norm: float  # infinity: never clip
    measure: bool  # the norm is known before the update
    skip_nonfinite: bool  # leave everything as it was when a gradient holds inf or nan
    grad_scale: Tensor | None  # one float32: the gradients are to be divided by it
    found_inf: Tensor | None  # one float32: anything but zero asks for a skip
    clip: tuple[AdaptiveClip, Tensor] | None = None  # below `max_grad_norm`, and its state

    def for_kernels(self) -> tuple[Any, ...]:
        """The same for a compiled backend."""
        if self.clip is None:
            return self
        limit, state = self.clip
        return (*self[:-1], (limit.kind, limit.arguments(), state))

    def asks_for_skip(self) -> bool:
        return self.found_inf is not None and self.found_inf.float().item() != 0


class Decision(NamedTuple):
    """What a step does with its gradients."""

    inv_scale: float
    grad_norm: float
    clip_coef: float
    grad_factor: float
    skip: bool


class Control:
    """Indices into the float64 tensor that a step leaves its readings in."""

    SUM_OF_SQUARES, GRAD_NORM, CLIP_COEF, STEP_SKIPPED, SKIPPED_STEPS = range(5)
    CONSECUTIVE_SKIPS, STEPS = range(5, 7)
    SIZE = 7


def clip_coefficient(max_norm: float, norm: float) -> float:
    """What `torch.nn.utils.clip_grad_norm_` multiplies gradients by (Pascanu et al., 2013)."""
    if max_norm == math.inf:
        return 1.0
    coef = max_norm / (norm + 1e-6)
    return 1.0 if coef > 1.0 else coef  # nan stays nan


def decide(request: Request, sum_of_squares: float) -> Decision:
    """Unscaling and clipping, or a skip.

    A float32 squared is exact in float64 and can't overflow: the sum is finite exactly when all
    gradients are (float64 gradients above 1e154 count as overflow).
    """
    inv_scale = 1.0
    if request.grad_scale is not None:  # in a tensor, as Python's floats refuse to divide by zero
        inv_scale = request.grad_scale.float().double().reciprocal().item()
    grad_norm = math.sqrt(sum_of_squares) * inv_scale
    limit = request.max_grad_norm
    if request.clip is not None:
        clip, clip_state = request.clip
        limit = min(limit, clip.limit(clip_state, grad_norm))
    clip_coef = clip_coefficient(limit, grad_norm)
    nonfinite = request.skip_nonfinite and not math.isfinite(sum_of_squares)
    skip = nonfinite or request.asks_for_skip()
    return Decision(inv_scale, grad_norm, clip_coef, inv_scale * clip_coef, skip)


def smaller(own: float, shared: float) -> float:
    """Of a parameter's own coefficient and that of all; a nan of the latter stays one."""
    return own if own < shared else shared


def least(coef: float | Tensor) -> float:
    if isinstance(coef, Tensor):
        return coef.min().item() if coef.numel() > 0 else 1.0
    return coef


def coef_of(request: Request, index: int, param: Tensor, decision: Decision) -> float | Tensor:
    """What a parameter's gradient is clipped by, in float64: the smaller of two coefficients.

    A tensor stands for a coefficient per row, in a shape that broadcasts.
    """
    if request.clip is None or param.grad is None:
        return decision.clip_coef
    clip, clip_state = request.clip
    own = clip.own_coef(clip_state, index, param, decision)
    if isinstance(own, Tensor):
        return own.where(own < decision.clip_coef, decision.clip_coef)
    return smaller(own, decision.clip_coef)


def distinct_params(param_groups: list[Group]) -> Iterator[tuple[Group, Tensor]]:
    """Every parameter with its group, once: one that is listed again is updated once."""
    seen: set[int] = set()
    for group in param_groups:
        for param in group["params"]:
            if id(param) not in seen:
                seen.add(id(param))
                yield group, param


@torch.no_grad()
def step(
    rule: Rule,
    param_groups: list[Group],
    state: dict[Tensor, dict[str, Tensor]],
    counters: dict[Tensor, Tensor],
    request: Request,
    control: Tensor,
    rings: Rings | None,
) -> None:
    """One whole step. `control` (float64, shape (7,)) takes the readings; see `Control`."""
    pairs = list(distinct_params(param_groups))
    total = norms.sum_of_squares((param, param.grad) for _, param in pairs)
    decision = decide(request, total if request.measure else 0.0)
    before = None if rings is None else [param.clone() for _, param in pairs]
    coefs = []
    if not decision.skip:
        coefs = [coef_of(request, index, param, decision) for index, (_, param) in enumerate(pairs)]
    for (group, param), coef in zip(pairs, coefs, strict=False):
        if param.grad is not None:
            kept = dict(state.get(param, {}))
            if rule.counts_apart:
                kept[rule.counter] = counters[param]
            update(rule, group, param, kept, coef * decision.inv_scale)
    if not request.measure:
        decision = decide(request, total)
    if request.clip is not None and not decision.skip:
        clip, clip_state = request.clip
        if math.isfinite(decision.grad_norm) and decision.grad_norm > 0:
            clip.observe(clip_state, [param for _, param in pairs], decision)
        for coef in coefs:
            decision = decision._replace(clip_coef=smaller(least(coef), decision.clip_coef))
    if rings is not None and before is not None:
        record(rings, int(control[Control.STEPS]), param_groups, before, decision)
    skipped = control[Control.SKIPPED_STEPS].item() + decision.skip
    consecutive = control[Control.CONSECUTIVE_SKIPS].item() + 1 if decision.skip else 0
    steps = control[Control.STEPS].item() + 1
    readings = (total, decision.grad_norm, decision.clip_coef, float(decision.skip), skipped)
    control.copy_(control.new_tensor((*readings, consecutive, steps)))


def record(
    rings: Rings, steps: int, param_groups: list[Group], before: list[Tensor], decision: Decision
) -> None:
    """Writes a step's row of telemetry: of the step, and of every parameter."""
    row = steps % rings.size
    lrs = [float(group["lr"]) for group in param_groups]
    readings = (decision.grad_norm, decision.clip_coef, float(decision.skip), *lrs)
    rings.steps[row] = rings.steps.new_tensor(readings)
    column = dict.fromkeys(rings.params, 0)
    for (_, param), old in zip(distinct_params(param_groups), before, strict=True):
        ring = rings.params[param.device]
        ring[row, column[param.device]] = measures(param, old, decision)
        column[param.device] += 1


def measures(param: Tensor, before: Tensor, decision: Decision) -> Tensor:
    """What telemetry keeps of a parameter (`telemetry.PARAM_COLUMNS`): shape (6,), float64."""
    if param.grad is None:
        return torch.full((6,), math.nan, dtype=torch.float64, device=param.device)
    grad = as_read(param.grad, param)
    largest = (
        grad.abs().max().double() if grad.numel() > 0 else grad.new_zeros((), dtype=torch.float64)
    )
    zero = torch.zeros_like(largest)
    if decision.skip:
        update_norm, param_norm = zero, zero * math.nan
    else:
        dtype = compute_dtype(param.dtype)
        update_norm = norms.norm_of_chunks(
            norms.sums_in_single(param.to(dtype) - before.to(dtype), param)
        )
        param_norm = norms.norm_of_chunks(norms.sums_in_single(before.to(dtype), param))
    return torch.stack(
        [
            norms.norm_of_chunks(norms.sums_of_squares(grad, param)) * decision.inv_scale,
            largest * decision.inv_scale,
            grad.isinf().sum().double(),
            grad.isnan().sum().double(),
            update_norm,
            param_norm,
        ]
    )


def update(
    rule: Rule,
    group: Group,
    param: Tensor,
    state: dict[str, Tensor],
    grad_factor: float | Tensor,
) -> None:
    """Applies a rule to one parameter, in place. The factor (float64) is rounded once."""
    assert param.grad is not None
    dtype = compute_dtype(param.dtype)
    names = {*rule.scalars, rule.counter}
    scalars = rule.advance(group, {name: state[name] for name in names})
    factor = -grad_factor if group["maximize"] else grad_factor
    if isinstance(factor, Tensor):
        factor = factor.to(dtype)
    new_param, new_states = rule.update(
        {**group, "lr": float(group["lr"])},
        scalars,
        param.to(dtype),
        as_read(param.grad, param).to(dtype) * factor,
        {name: state[name].to(dtype) for name in rule.states(group)},
    )
    param.copy_(new_param)
    for name, value in {**new_states, **scalars}.items():
        state[name].copy_(value)


@torch.no_grad()
def total_norm(grads: list[Tensor], norm_type: float) -> Tensor:
    """The norm of the norms of all gradients: 0-d float64 on the first one's device.

    Of order 2 it is summed as the module's docstring says. An empty gradient counts as zeros, but
    with a negative order, where there is no such norm: torch raises a RuntimeError.
    """
    if norm_type == 2.0:
        norm = math.sqrt(norms.sum_of_squares((grad, grad) for grad in grads))
        return torch.tensor(norm, dtype=torch.float64, device=grads[0].device)
    each = [
        torch.linalg.vector_norm(grad, norm_type, dtype=torch.float64).to(grads[0].device)
        for grad in grads
        if grad.numel() > 0 or norm_type < 0
    ]
    if not each:
        return torch.zeros((), dtype=torch.float64, device=grads[0].device)
    return torch.linalg.vector_norm(torch.stack(each), norm_type)


@torch.no_grad()
def clip_grads(
    grads: list[Tensor],
    max_norm: float,
    norm_type: float,
    skip_nonfinite: bool,
    known_norm: Tensor | float | None,
) -> tuple[Tensor | None, bool]:
    """Clips gradients in place, each once however often it is listed.

    Returns:
        Their norm (0-d float64; None where there is no gradient), and whether one is float64.
    """
    if not grads:
        return None, False
    norm = total_norm(grads, norm_type) if known_norm is None else torch.as_tensor(known_norm)
    norm = norm.to(grads[0].device, torch.float64).reshape(())
    factor = clip_coefficient(max_norm, norm.item())
    if factor != 1.0 and (norm.isfinite() or not skip_nonfinite):
        for grad in {(grad.data_ptr(), grad.numel()): grad for grad in grads}.values():
            grad.copy_(grad.to(compute_dtype(grad.dtype)) * factor)
    return norm, any(grad.dtype == torch.float64 for grad in grads)
