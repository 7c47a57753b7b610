"""The norm has the reference's bits wherever squares leave the range of float32, is as precise as
stated, and does not depend on the order of the tensors."""

from __future__ import annotations

import math

import pytest
import torch
from cases import DTYPES, assert_same_bits, make_params, set_grads, tensors_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fusedopt
from fusedopt.clip import PerTensor, Unit
from fusedopt.reference import norms

SETTINGS = settings(
    derandomize=True,
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
# An element's square is SMALLEST_SUM: 2^-80, to the bit.
THRESHOLD = math.sqrt(norms.SMALLEST_SUM)
# The largest number whose square is finite in float32 is about 1.8e19.
SCALES = [0.0, 1e-40, 1e-30, 1e-20, THRESHOLD, 1e-12, 1.0, 1.8e19, 1.9e19, 1e30, 3e38]
SHAPES = [(1,), (7,), (63,), (1025,), (3, 5), (700, 33), (16384,), (2, 16385), (40000,)]
LIMITS = [None, math.inf, 1.0, 1e-6, PerTensor(warmup=1), Unit(0.5)]


@st.composite
def plans(draw):
    """Shapes, each with a scale per chunk and values that are planted at some places."""
    planted = st.tuples(
        st.integers(0, 2**20),
        st.sampled_from([0.0, 1e-38, 1e-25, THRESHOLD, 2e19, 3e38, math.inf, -math.inf, math.nan]),
    )
    scales = st.lists(st.sampled_from(SCALES), min_size=3, max_size=3)
    tensor = st.tuples(
        st.sampled_from(SHAPES), st.sampled_from(DTYPES), scales, st.lists(planted, max_size=2)
    )
    return draw(st.lists(tensor, min_size=1, max_size=3))


def make_grad(shape, scales, planted, seed):
    """Normal numbers with a scale of its own for each chunk, within float32's range."""
    flat = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).reshape(-1)
    for chunk, scale in zip(flat.split(norms.CHUNK_SIZE), scales):
        chunk.copy_(chunk.double().mul(scale).clamp(-3.3e38, 3.3e38))
    for place, value in planted:
        flat[place % flat.numel()] = value
    return flat.view(shape)


def run(make, plan, device, limit, telemetry):
    """All that a step leaves, by name."""
    params = [torch.ones(shape, dtype=dtype, device=device) for shape, dtype, *_ in plan]
    optimizer = make(
        fusedopt.FusedSGD,
        [p.requires_grad_() for p in params],
        lr=1e-3,
        max_grad_norm=limit,
        nonfinite="propagate",
        telemetry=1 if telemetry else None,
    )
    for p, (shape, dtype, scales, planted) in zip(params, plan):
        p.grad = make_grad(shape, scales, planted, p.numel()).to(device, dtype)
    optimizer.step()
    measured = optimizer.telemetry().columns() if telemetry else {}
    return {"readings": optimizer._readings(), **tensors_of(optimizer), **measured}


@pytest.mark.parametrize("telemetry", [False, True], ids=["plain", "telemetry"])
@pytest.mark.parametrize("limit", LIMITS, ids=str)
@SETTINGS
@given(plan=plans())
def test_bits_around_the_thresholds(backend, limit, telemetry, plan):
    def reference(cls, params, **kwargs):
        return cls(params, backend="reference", **kwargs)

    found = run(backend.make, plan, backend.device, limit, telemetry)
    assert_same_bits(found, run(reference, plan, backend.device, limit, telemetry))


def sum_of_squares(backend, params, **kwargs):
    optimizer = backend.make(fusedopt.FusedSGD, params, lr=0.0, **kwargs)
    optimizer.step()
    return optimizer._readings()[0].item()


@pytest.mark.parametrize("scale", [1e-38, 1e-21, 1e-12, 1.0, 1e15, 1e19, 1e25, 3e37])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_relative_error_of_the_norm_is_below_1e_7(backend, dtype, scale):
    """Against the exact sum of all squares, which math.fsum gives."""
    if dtype == torch.float16 and not 1e-3 < scale < 1e3:
        pytest.skip("float16 has no numbers of this size")
    params = [torch.zeros(3, 16384 + 77, dtype=dtype, device=backend.device).requires_grad_()]
    generator = torch.Generator().manual_seed(3)
    grad = torch.randn(params[0].shape, generator=generator).abs().mul(scale).to(dtype)
    params[0].grad = grad.to(backend.device)
    exact = math.fsum(x * x for x in grad.double().view(-1).tolist())
    found = sum_of_squares(backend, params, max_grad_norm=1.0)
    assert math.sqrt(found) == pytest.approx(math.sqrt(exact), rel=1e-7)


@pytest.mark.parametrize("limit", [None, 1.0])
def test_the_order_of_tensors_changes_no_bit(backend, limit):
    """The chunks' sums are added exactly."""
    params = make_params([(17,), (40000,), (5, 5), (16384,), (3,), (20001,)], device=backend.device)
    for seed, p in enumerate(params):
        set_grads([p], seed, scale=10.0 ** (3 * seed - 9))
    sums = {sum_of_squares(backend, order, max_grad_norm=limit)
            for order in (params, params[::-1], params[3:] + params[:3])}  # fmt: skip
    assert len(sums) == 1
    assert sums.pop() == norms.sum_of_squares([(p, p.grad) for p in params])


def test_rows_of_any_size_have_the_norm_of_float64(backend):
    """The limit of a row shows in the row's update."""
    for shape in [(700, 33), (2, 16385), (1, 40000)]:
        (p,) = make_params([shape], device=backend.device)
        optimizer = backend.make(fusedopt.FusedSGD, [p], lr=1.0, max_grad_norm=Unit(0.25))
        before = p.detach().double().clone()
        set_grads([p], 0, scale=100.0)
        optimizer.step()
        update = before - p.detach().double()
        expected = 0.25 * before.norm(dim=1).clamp_min(1e-3)
        torch.testing.assert_close(update.norm(dim=1), expected, rtol=1e-5, atol=0)


@SETTINGS
@given(numbers=st.lists(st.floats(0, 1.5e154), min_size=1, max_size=40))
def test_sums_of_chunks_are_exact_and_rounded_once(backend, numbers):
    """Each tensor is one chunk. Squares are subnormal, huge, far apart, or add up to inf."""
    params = [torch.zeros(1, dtype=torch.float64, device=backend.device) for _ in numbers]
    for p, number in zip(params, numbers):
        p.requires_grad_().grad = torch.full_like(p, number)
    squares = [number * number for number in numbers]
    try:
        expected = math.fsum(squares)
    except OverflowError:
        expected = math.inf
    assert sum_of_squares(backend, params, max_grad_norm=1.0, nonfinite="propagate") == expected
