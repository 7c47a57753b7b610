"""One whole step: measure, decide, update or skip, observe, record."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Real
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from fusedopt.reference import formats, message, norms
from fusedopt.reference.arithmetic import can_be_updated, cast_grad, compute_dtype, scaled
from fusedopt.reference.coefficients import Decision, least, smaller
from fusedopt.reference.decision import Control, StepOptions, decide
from fusedopt.reference.exact_sum import exact_sum
from fusedopt.reference.groups import Group, distinct_params, is_clipped
from fusedopt.reference.rule import Rule, TrustNorms


class Rings(Protocol):
    """The tensors that telemetry is written to; see `fusedopt.telemetry.rings.Rings`."""

    size: int
    steps: Tensor
    params: dict[torch.device, Tensor]


@torch.no_grad()
def step(
    rule: Rule,
    param_groups: list[Group],
    state: dict[Tensor, dict[str, Tensor]],
    counters: dict[Tensor, Tensor],
    options: StepOptions,
    control: Tensor,
    rings: Rings | None,
    exchange: message.Exchange | None = None,
    first_elements: Mapping[Tensor, int] = MappingProxyType({}),
) -> None:
    """Runs one step, and writes its readings to `control` (float64, shape (7,)); see `Control`.

    `exchange` adds up messages over ranks. `first_elements`: of parameters that are parts of whole
    tensors, the index of their element 0 there.
    """
    pairs = list(distinct_params(param_groups))
    measured = [pair for pair in pairs if can_be_updated(pair[1])]
    if exchange is None:
        total = sum_of_squares(measured)
    else:
        sums = norms.chunk_sums_by_device((param, param.grad) for _, param in measured)
        messages = exchange([*map(message.write, sums, exchange.counted)])
        total = message.sum_of_squares(messages.tolist())
        found_inf = message.asks_for_skip(messages)
        options = options._replace(measure=True, found_inf=found_inf)
    decision = decide(options, total if options.measure else 0.0)
    before = None if rings is None else _values(pairs, state)
    coefs = []
    if not decision.skip:
        coefs = [coef_of(options, index, *pair, decision) for index, pair in enumerate(pairs)]
    for index, ((group, param), coef) in enumerate(zip(pairs, coefs, strict=False)):
        if param.grad is not None:
            kept = dict(state.get(param) or {})
            if rule.hidden_step:
                kept[rule.counter] = counters[param]
            first = first_elements.get(param, 0)
            update(rule, group, param, kept, coef * decision.inv_scale, index, first)
    if not options.measure:
        decision = decide(options, total)
    if options.clip is not None and not decision.skip:
        clip, clip_state = options.clip
        if math.isfinite(decision.grad_norm) and decision.grad_norm > 0:
            clipped = [param if is_clipped(group) else None for group, param in pairs]
            clip.observe(clip_state, clipped, decision)
        for coef in coefs:
            decision = decision._replace(clip_coef=smaller(least(coef), decision.clip_coef))
    if rings is not None and before is not None:
        after = _values(pairs, state)
        record(rings, int(control[Control.STEPS]), param_groups, before, after, decision)
    write_readings(control, total, decision)


def sum_of_squares(measured: list[tuple[Group, Tensor]]) -> float:
    """The sum of squares over the gradients that are clipped. inf and nan count in any group."""
    sums = [
        norms.counted_sums(norms.chunk_sums(param, param.grad), is_clipped(group)).cpu()
        for group, param in measured
    ]
    return exact_sum(torch.cat(sums)) if sums else 0.0


def _values(
    pairs: list[tuple[Group, Tensor]], state: dict[Tensor, dict[str, Tensor]]
) -> list[Tensor]:
    """Copies of the parameters that have gradients, or of their masters; the others as they are."""
    return [
        param if param.grad is None else formats.param_values(group, param, state.get(param))
        for group, param in pairs
    ]


def write_readings(control: Tensor, sum_of_squares: float, decision: Decision) -> None:
    """Leaves what a step found and did in `control`; see `Control`."""
    skipped = control[Control.SKIPPED_STEPS].item() + decision.skip
    consecutive = control[Control.CONSECUTIVE_SKIPS].item() + 1 if decision.skip else 0
    steps = control[Control.STEPS].item() + 1
    readings = (decision.grad_norm, decision.clip_coef, float(decision.skip), skipped)
    control.copy_(control.new_tensor((sum_of_squares, *readings, consecutive, steps)))


def coef_of(
    options: StepOptions, index: int, group: Group, param: Tensor, decision: Decision
) -> float | Tensor:
    """The clip coefficient of a parameter, in float64: the smaller of its own and the global one.

    A tensor holds a coefficient per row, in a shape that broadcasts.
    """
    if not is_clipped(group):
        return 1.0
    if options.clip is None or param.grad is None:
        return decision.clip_coef
    clip, clip_state = options.clip
    own = clip.own_coef(clip_state, index, param, decision)
    if isinstance(own, Tensor):
        return own.where(own < decision.clip_coef, decision.clip_coef)
    return smaller(own, decision.clip_coef)


def record(
    rings: Rings,
    steps: int,
    param_groups: list[Group],
    before: list[Tensor],
    after: list[Tensor],
    decision: Decision,
) -> None:
    """Writes telemetry: the row of the step, and the row of every parameter."""
    row = steps % rings.size
    lrs = [float(group["lr"]) for group in param_groups]
    readings = (decision.grad_norm, decision.clip_coef, float(decision.skip), *lrs)
    rings.steps[row] = rings.steps.new_tensor(readings)
    column = dict.fromkeys(rings.params, 0)
    params = distinct_params(param_groups)
    for (_, param), old, new in zip(params, before, after, strict=True):
        if param.device not in rings.params:  # on the meta device, and left alone
            continue
        ring = rings.params[param.device]
        ring[row, column[param.device]] = measures(param, old, new, decision)
        column[param.device] += 1


def measures(param: Tensor, before: Tensor, after: Tensor, decision: Decision) -> Tensor:
    """A parameter's row of telemetry (`telemetry.PARAM_COLUMNS`): float64, shape (6,).

    `before` and `after` the step: the parameter, or its master.
    """
    if param.grad is None:
        return torch.full((6,), math.nan, dtype=torch.float64, device=param.device)
    grad = cast_grad(param.grad, param)
    largest = (
        grad.abs().max().double() if grad.numel() > 0 else grad.new_zeros((), dtype=torch.float64)
    )
    zero = torch.zeros_like(largest)
    if decision.skip:
        update_norm, param_norm = zero, zero * math.nan
    else:
        update_norm = norms.norm_of_chunks(norms.sums_in_single(after - before, param))
        param_norm = norms.norm_of_chunks(norms.sums_in_single(before, param))
    return torch.stack(
        [
            norms.grad_norm(grad, param) * decision.inv_scale,
            largest * decision.inv_scale,
            grad.isinf().sum().double(),
            grad.isnan().sum().double(),
            update_norm,
            param_norm,
        ]
    )


def _with_floats(group: Group) -> Group:
    """The group with its numbers, of whatever type, in float64, as the kernels read them."""

    def converted(value: Any) -> Any:
        is_one = isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1)
        return float(value) if is_one and not isinstance(value, bool) else value

    return {key: value if key == "params" else converted(value) for key, value in group.items()}


def update(
    rule: Rule,
    group: Group,
    param: Tensor,
    state: dict[str, Tensor],
    grad_factor: float | Tensor,
    number: int = 0,
    first: int = 0,
) -> None:
    """Applies the rule to one parameter, and changes it and its states in place.

    `number`: the parameter's index among all of the optimizer's. `first`: the index of its element
    0 in the whole tensor.
    """
    assert param.grad is not None
    dtype = compute_dtype(param.dtype)
    names = {*rule.scalars, rule.counter}
    scalars = rule.advance(group, {name: state[name] for name in names})
    grad = scaled(cast_grad(param.grad, param).to(dtype), grad_factor)
    grad = -grad if group.get("maximize") else grad
    options, values = _with_floats(group), formats.param_values(group, param, state)
    seed = formats.formats_of(group).seed or 0
    random = formats.RandomBits(seed, int(scalars[rule.counter]), number, first)

    def load(names: Iterable[str]) -> dict[str, Tensor]:
        return {name: formats.state_values(rule, group, name, param, state) for name in names}

    def store(states: dict[str, Tensor]) -> None:
        for name, value in states.items():
            formats.store_state(rule, group, name, param, state, value, random)

    ratio: tuple[float, ...] = ()
    if (trust := rule.trust) is not None:
        read = load((*trust.states, *trust.reads))
        term, new_states = trust.term(options, scalars, values, grad, read)
        store(new_states)
        param_norm = norms.tensor_norm(values, param) if trust.reads_param else 0.0
        found = TrustNorms(param_norm, norms.tensor_norm(term, param), param.numel())
        ratio = (trust.ratio(options, found),)
    states = load(rule.states(group))
    new_param, new_states = rule.update(options, scalars, values, grad, states, *ratio)
    formats.store_param(group, param, state, new_param, random)
    store(new_states)
    for name, value in rule.prepare_next(group, scalars).items():
        state[name].copy_(value)
