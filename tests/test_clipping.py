"""The global norm, the limit on it, and the three readings of a step."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from cases import (
    CLASSES,
    DTYPES,
    assert_same_bits,
    make_params,
    set_grads,
    snapshot,
    tensors_of,
)

import fusedopt

SMALL = [(3,), (0,), (555,), (), (16385,)]


def norm64(params):
    return math.sqrt(sum(p.grad.double().square().sum().item() for p in params))


def readings(optimizer):
    return [
        value.item()
        for value in (optimizer.grad_norm, optimizer.step_skipped, optimizer.skipped_steps)
    ]


@pytest.mark.parametrize("kwargs", [{}, {"max_grad_norm": 1.0}, {"nonfinite": "skip"}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_is_that_of_float64_rounded_once(backend, dtype, kwargs):
    params = make_params(SMALL, dtype, backend.device)
    optimizer = backend.make(fusedopt.FusedAdam, params, **kwargs)
    for seed in range(2):
        set_grads(params, seed, scale=3.7)
        optimizer.step()
        torch.testing.assert_close(
            optimizer.grad_norm.item(), norm64(params), rtol=2.0**-24 + 1e-13, atol=0
        )


@pytest.mark.parametrize("value", [1e-30, 1e-40, 1e-45])
def test_norm_of_tiny_gradients_does_not_vanish(backend, value):
    params = make_params([(555,)], device=backend.device)
    optimizer = backend.make(fusedopt.FusedAdam, params, max_grad_norm=1.0)
    params[0].grad = torch.full_like(params[0], value)
    optimizer.step()
    expected = torch.tensor(norm64(params)).float().item()
    torch.testing.assert_close(optimizer.grad_norm.item(), expected, rtol=2.0**-23, atol=0)


@pytest.mark.parametrize("limit", [1e-6, 1e-3, 0.7, 5.0, 1e3, math.inf])
@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_update_is_that_of_torch_after_clipping_in_float64(backend, case, limit):
    params = make_params(SMALL, torch.float64, backend.device)
    twins = make_params(SMALL, torch.float64, backend.device)
    kwargs = dict(case.kwargs)
    if "eps" in inspect.signature(case.twin).parameters:
        kwargs["eps"] = 1e-3
    fused = backend.make(case.cls, params, max_grad_norm=limit, **kwargs)
    twin = case.twin(twins, foreach=False, **kwargs)
    for seed in range(3):
        set_grads(params, seed, scale=0.01)
        set_grads(twins, seed, scale=0.01)
        fused.step()
        torch.nn.utils.clip_grad_norm_(twins, limit)
        twin.step()
    torch.testing.assert_close(tensors_of(fused), tensors_of(twin), rtol=1e-9, atol=1e-12)


def test_coefficient_is_the_limit_over_the_norm_plus_1e_6(backend):
    """A norm as small as 1e-6 shows the summand; the first moment shows the coefficient."""
    params = make_params([(1,)], torch.float64, backend.device)
    optimizer = backend.make(fusedopt.FusedAdam, params, max_grad_norm=5e-7)
    params[0].grad = torch.full_like(params[0], 3e-6)
    optimizer.step()
    expected = 0.1 * 3e-6 * (5e-7 / (3e-6 + 1e-6))
    assert optimizer.state[params[0]]["exp_avg"].item() == pytest.approx(expected, rel=1e-12)


def test_a_norm_just_below_the_limit_is_not_scaled_up(backend):
    """limit / (norm + 1e-6) is above 1 here."""
    params = make_params([(1,)], torch.float64, backend.device)
    optimizer = backend.make(fusedopt.FusedAdam, params, max_grad_norm=3.0)
    params[0].grad = torch.full_like(params[0], 2.0)
    optimizer.step()
    assert optimizer.state[params[0]]["exp_avg"].item() == pytest.approx(0.2, rel=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("value", [1e25, 1e30, 3e38])
@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_huge_finite_gradients_are_clipped_not_skipped(backend, case, value, dtype):
    params = make_params([(3,), (555,)], dtype, backend.device)
    before = [p.detach().clone() for p in params]
    # Some classes' first steps are small: with 1.0 some bfloat16 weights would stay as they are.
    lr = 100.0 if case.cls in (fusedopt.FusedAdadelta, fusedopt.FusedLARS) else 1.0
    optimizer = backend.make(case.cls, params, max_grad_norm=1.0, lr=lr, **case.kwargs)
    for p in params:
        p.grad = torch.full_like(p, value)
    optimizer.step()
    assert not optimizer.step_skipped and optimizer.skipped_steps == 0
    assert optimizer.grad_norm > value
    for p, old in zip(params, before):
        assert p.isfinite().all() and (p != old).all()
        for state in optimizer.state[p].values():
            assert state.isfinite().all()


def test_infinite_limit_measures_and_skips_but_never_clips(backend):
    params = make_params(SMALL, device=backend.device)
    twins = make_params(SMALL, device=backend.device)
    measured = backend.make(fusedopt.FusedAdam, params, max_grad_norm=math.inf)
    plain = backend.make(fusedopt.FusedAdam, twins)
    set_grads(params, 0, scale=1e6)
    set_grads(twins, 0, scale=1e6)
    measured.step()
    plain.step()
    assert_same_bits(tensors_of(measured), tensors_of(plain))
    before = snapshot(measured)
    params[2].grad[7] = math.inf
    measured.step()
    assert measured.step_skipped
    assert_same_bits(tensors_of(measured), before)


@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_bits_below_the_limit_are_those_without_one(backend, case):
    params = make_params(SMALL, device=backend.device)
    twins = make_params(SMALL, device=backend.device)
    limited = backend.make(case.cls, params, max_grad_norm=1e4, **case.kwargs)
    plain = backend.make(case.cls, twins, **case.kwargs)
    for seed in range(2):
        set_grads(params, seed)
        set_grads(twins, seed)
        limited.step()
        plain.step()
        assert_same_bits(tensors_of(limited), tensors_of(plain))
        assert limited.grad_norm == plain.grad_norm < 1e4


def test_norm_is_that_of_all_groups_and_dtypes(backend):
    by_dtype = [make_params([(33,), (700,)], dtype, backend.device) for dtype in DTYPES]
    groups = [{"params": params, "lr": 0.1 * i} for i, params in enumerate(by_dtype)]
    optimizer = backend.make(fusedopt.FusedRMSprop, groups, max_grad_norm=1.0)
    for seed, params in enumerate(by_dtype):
        set_grads(params, seed)
    params = [p for params in by_dtype for p in params]
    optimizer.step()
    torch.testing.assert_close(
        optimizer.grad_norm.item(), norm64(params), rtol=2.0**-24 + 1e-13, atol=0
    )
    coef = 1 / (norm64(params) + 1e-6)
    square = 0.01 * (params[2].grad * coef) ** 2
    torch.testing.assert_close(optimizer.state[params[2]]["square_avg"], square)


def test_bits_do_not_depend_on_the_number_of_threads(backend):
    results = []
    for threads in (1, 2, 3, 7, 7):
        torch.set_num_threads(threads)
        params = make_params([(0,), (33333,), (5,), (230000,)], device=backend.device)
        optimizer = backend.make(fusedopt.FusedAdam, params, max_grad_norm=1.0)
        for seed in range(2):
            set_grads(params, seed)
            optimizer.step()
        results.append({**snapshot(optimizer), "norm": optimizer.grad_norm})
    for result in results[1:]:
        assert_same_bits(result, results[0])


def test_limit_may_change_between_steps(backend):
    params = make_params([(555,)], torch.float64, backend.device)
    twins = make_params([(555,)], torch.float64, backend.device)
    fused = backend.make(fusedopt.FusedAdam, params)
    twin = torch.optim.Adam(twins, foreach=False)
    for seed, limit in enumerate([None, 0.5, 2.0, math.inf, 0.01, None]):
        fused.max_grad_norm = limit
        assert fused.max_grad_norm == limit
        set_grads(params, seed)
        set_grads(twins, seed)
        fused.step()
        if limit is not None:
            torch.nn.utils.clip_grad_norm_(twins, limit)
        twin.step()
    torch.testing.assert_close(tensors_of(fused), tensors_of(twin), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kwargs", [{}, {"max_grad_norm": 1.0}, {"nonfinite": "raise"}], ids=str)
def test_readings_before_the_first_step(backend, kwargs):
    optimizer = backend.make(
        fusedopt.FusedAdam, make_params(SMALL, device=backend.device), **kwargs
    )
    assert readings(optimizer) == [0.0, False, 0]


@pytest.mark.parametrize("kwargs", [{}, {"max_grad_norm": 1.0}, {"nonfinite": "raise"}], ids=str)
def test_step_without_any_gradient_reads_zero(backend, kwargs):
    params = make_params(SMALL, device=backend.device)
    optimizer = backend.make(fusedopt.FusedAdam, params, **kwargs)
    optimizer.step()
    assert readings(optimizer) == [0.0, False, 0]
    assert not optimizer.state
    set_grads(params, 0)
    optimizer.step()
    before = snapshot(optimizer)
    optimizer.zero_grad()
    optimizer.step()
    assert readings(optimizer) == [0.0, False, 0]
    assert_same_bits(tensors_of(optimizer), before)


def test_readings_are_scalars_on_the_device(backend):
    params = make_params(SMALL, torch.bfloat16, backend.device)
    optimizer = backend.make(fusedopt.FusedAdam, params)
    for _ in range(2):
        expected = [
            (optimizer.grad_norm, torch.float32),
            (optimizer.step_skipped, torch.bool),
            (optimizer.skipped_steps, torch.int64),
        ]
        for reading, dtype in expected:
            assert (reading.dtype, reading.dim()) == (dtype, 0)
            assert reading.device == params[0].device
            assert not reading.requires_grad
        set_grads(params, 0)
        optimizer.step()


def test_readings_are_not_changed_by_later_steps_nor_by_their_holder(backend):
    params = make_params([(3,)], device=backend.device)
    optimizer = backend.make(fusedopt.FusedAdam, params, max_grad_norm=1.0)
    params[0].grad = torch.full_like(params[0], math.nan)
    optimizer.step()
    kept = optimizer.grad_norm, optimizer.step_skipped, optimizer.skipped_steps
    params[0].grad = torch.full_like(params[0], 2.0)
    optimizer.step()
    assert kept[0].isnan() and kept[1] and kept[2] == 1
    optimizer.skipped_steps.add_(5)
    optimizer.grad_norm.zero_()
    assert readings(optimizer) == [pytest.approx(math.sqrt(12)), False, 1]


HUGE = {torch.float64: 1e150}  # else 3e38


@pytest.mark.parametrize(
    "limit", [1e-3, 1e-5, 1e-12, fusedopt.clip.Unit(), fusedopt.clip.PerTensor()]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_huge_gradients_and_a_tiny_limit(backend, limit, dtype):
    """The coefficient may be below float32's numbers where the clipped gradient is not."""

    def moved(make):
        params = make_params(SMALL, dtype, backend.device)
        for param in params:
            param.data.zero_()
            param.grad = torch.full_like(param, HUGE.get(dtype, 3e38))
        optimizer = make(fusedopt.FusedSGD, params, lr=1.0, max_grad_norm=limit)
        optimizer.step()
        return params, snapshot(optimizer)

    params, tested = moved(backend.make)
    _, expected = moved(lambda cls, params, **kwargs: cls(params, backend="reference", **kwargs))
    assert_same_bits(tested, expected)
    if isinstance(limit, float):
        norm = math.sqrt(sum(p.detach().double().square().sum().item() for p in params))
        assert norm == pytest.approx(limit, rel=0.01)


@pytest.mark.parametrize("limit", [1e-3, 1e-12])
def test_clip_grad_norm_of_huge_gradients(backend, limit):
    params = make_params(SMALL, device=backend.device)
    for param in params:
        param.grad = torch.full_like(param, 3e38)
    name = "cpu" if backend.name == "cpu" else "cuda"
    fusedopt.clip_grad_norm_(params, limit, backend=name)
    assert norm64(params) == pytest.approx(limit, rel=0.01)
