"""For random runs, a backend has the bits and readings of the reference after every step."""

from __future__ import annotations

import inspect
import math

import torch
from cases import CASES, DTYPES, assert_same_bits, tensors_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fusedopt
from fusedopt.clip import Percentile, PerTensor, Unit, ZScore

SETTINGS = settings(
    derandomize=True,
    deadline=None,
    max_examples=50,
    # The backend may be shared by all examples: it keeps nothing.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
FLOATS = st.floats(0, 0.999, allow_nan=False)
SHAPES = st.one_of(
    st.lists(st.integers(0, 9), max_size=4).map(tuple),
    st.sampled_from([(555,), (129, 130), (16384,), (16385,), (3, 33, 41)]),
)


KINDS = ["contiguous", "contiguous", "reversed", "rolled", "gaps", "offset"]
LAYOUTS = st.tuples(st.sampled_from(KINDS), st.integers(1, 7))
LIMITS = [None, 1e-3, 1.0, 50.0, math.inf]
LIMITS += [ZScore(warmup=1), Percentile(50, window=3, warmup=1), PerTensor(warmup=1), Unit(0.05)]


def lay_out(values, layout):
    """A tensor with these values, and memory as the layout says."""
    kind, number = layout
    dims = values.dim()
    if kind == "reversed":
        order = tuple(reversed(range(dims)))
        return values.permute(order).contiguous().permute(order)
    if kind == "rolled" and dims > 1:
        there, back = (*range(1, dims), 0), (dims - 1, *range(dims - 1))
        return values.permute(there).contiguous().permute(back)
    if kind == "gaps":
        dim = number % (dims + 1)
        return torch.stack([values] * (number % 3 + 2), dim).select(dim, number % 2)
    if kind == "offset":
        flat = torch.cat([values.new_zeros(number), values.reshape(-1)])
        return flat[number:].view(values.shape)
    return values.clone()


OPTIONS = {
    "lr": st.sampled_from([0.0, 1e-3, 0.3, 7.0]),
    "eps": st.sampled_from([0.0, 1e-8, 1e-3]),
    "weight_decay": st.sampled_from([0.0, 1e-2, 0.7]),
    "maximize": st.booleans(),
    "betas": st.tuples(FLOATS, FLOATS),
    "amsgrad": st.booleans(),
    "decoupled_weight_decay": st.booleans(),
    "momentum_decay": st.sampled_from([0.0, 4e-3, 0.7, 30.0]),
    "alpha": FLOATS,
    "centered": st.booleans(),
    "lambd": st.sampled_from([0.0, 1e-4, 0.3]),
    "t0": st.sampled_from([-1.0, 2.0, 1e6]),
    "lr_decay": st.sampled_from([0.0, 0.1]),
    "initial_accumulator_value": st.sampled_from([0.0, 0.5]),
    "etas": st.sampled_from([(0.5, 1.2), (0.3, 2.0)]),
    "step_sizes": st.sampled_from([(1e-6, 50.0), (0.01, 0.02)]),
    "beta3_warmup": st.sampled_from([0, 3, 50]),
    "alpha_warmup": st.sampled_from([0, 3, 50]),
    "momentum": FLOATS,
    "dampening": FLOATS,
    "nesterov": st.booleans(),
    "always_adapt": st.booleans(),
    "trust_clip": st.booleans(),
    "bias_correction": st.booleans(),
}


@st.composite
def options(draw, case):
    drawn = dict(case.kwargs)
    for name in inspect.signature(case.twin).parameters:
        if name in OPTIONS and draw(st.booleans()):
            drawn[name] = draw(OPTIONS[name])
    if case.cls is fusedopt.FusedAdEMAMix and "betas" in drawn:
        drawn["betas"] = (*drawn["betas"][:2], draw(FLOATS))
    if drawn.get("nesterov") and (drawn.get("momentum", 0) <= 0 or drawn.get("dampening", 0) != 0):
        del drawn["nesterov"]  # torch refuses it
    return drawn


@st.composite
def plans(draw):
    """Random training runs, without the values of their tensors."""
    case = draw(st.sampled_from(CASES))
    limit = draw(st.sampled_from(LIMITS))
    kinds = LAYOUTS
    if isinstance(limit, Unit):  # whose rows are to be contiguous
        kinds = LAYOUTS.filter(lambda layout: layout[0] not in ("reversed", "rolled"))
    params = st.tuples(SHAPES, st.sampled_from(DTYPES), kinds)
    group = st.tuples(st.lists(params, min_size=1, max_size=4), options(case))
    groups = draw(st.lists(group, min_size=1, max_size=3))
    ours = {
        "max_grad_norm": limit,
        "nonfinite": draw(st.sampled_from([None, "skip", "raise", "propagate"])),
    }
    steps = draw(st.lists(draw_step(sum(len(p) for p, _ in groups)), min_size=1, max_size=4))
    return case, groups, ours, steps


def draw_step(count):
    """For every parameter its gradient's layout or None, then the scale and the planted values."""
    grad = st.one_of(st.none(), LAYOUTS, LAYOUTS, LAYOUTS, LAYOUTS)
    planted = st.tuples(
        st.integers(0, count - 1),
        st.integers(0, 2**20),
        st.sampled_from([math.inf, -math.inf, math.nan]),
    )
    return st.tuples(
        st.lists(grad, min_size=count, max_size=count),
        st.sampled_from([1e-30, 1e-3, 1.0, 300.0]),
        st.one_of(st.just([]), st.just([]), st.lists(planted, max_size=2)),
        st.sampled_from([None, None, 1.0, 1024.0, 3.7]),
        st.sampled_from([None, None, 0.0, 1.0]),
    )


def make_groups(groups, device):
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "params": [
                lay_out(
                    torch.randn(shape, generator=generator).to(device, dtype), layout
                ).requires_grad_()
                for shape, dtype, layout in params
            ],
            **kwargs,
        }
        for params, kwargs in groups
    ]


def set_grads(optimizer, step, seed):
    grads, scale, planted, grad_scale, found_inf = step
    generator = torch.Generator().manual_seed(seed)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    values = [torch.randn(p.shape, generator=generator) * scale for p in params]
    for index, element, value in planted:
        if values[index].numel() > 0:
            values[index].view(-1)[element % values[index].numel()] = value
    for p, value, layout in zip(params, values, grads):
        p.grad = None if layout is None else lay_out(value.to(p.device, p.dtype), layout)
    for name, number in (("grad_scale", grad_scale), ("found_inf", found_inf)):
        setattr(
            optimizer, name, None if number is None else torch.tensor(number).to(params[0].device)
        )


def outcome(optimizer):
    """The visible results of a step: the parameters that an error names, and the readings."""
    names = None
    try:
        optimizer.step()
    except fusedopt.NonFiniteGradientError as error:
        names = error.names
    return names, {
        name: getattr(optimizer, name) for name in ("grad_norm", "step_skipped", "skipped_steps")
    }


@SETTINGS
@given(plan=plans())
def test_same_bits_as_the_reference(backend, plan):
    case, groups, ours, steps = plan
    fused = backend.make(case.cls, make_groups(groups, backend.device), **ours)
    reference = case.cls(make_groups(groups, backend.device), backend="reference", **ours)
    for seed, step in enumerate(steps):
        set_grads(fused, step, seed)
        set_grads(reference, step, seed)
        (names, readings), (expected_names, expected_readings) = outcome(fused), outcome(reference)
        assert names == expected_names
        assert_same_bits(readings, expected_readings)
        assert_same_bits(tensors_of(fused), tensors_of(reference))
