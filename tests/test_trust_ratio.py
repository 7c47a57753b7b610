"""Factors by tensor: LARS and LAMB move every tensor by a share of its norm; StableAdamW brakes."""

from __future__ import annotations

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
from limited import LIMITS
from test_parity import run_both

import fusedopt

TRUSTED = [case for case in CLASSES if case.cls.rule.trust is not None]
each_case = pytest.mark.parametrize("case", TRUSTED, ids=lambda case: case.cls.__name__)


ADAPTED = [case for case in TRUSTED if case.cls in (fusedopt.FusedLAMB, fusedopt.FusedLARS)]
each_adapted = pytest.mark.parametrize("case", ADAPTED, ids=lambda case: case.cls.__name__)


def test_all_classes_are_here():
    names = {case.cls.__name__ for case in TRUSTED}
    cautious = {"FusedCautiousAdamW", "FusedCautiousLion"}
    assert names == {"FusedLAMB", "FusedLARS", "FusedStableAdamW", *cautious}


def moved_by(backend, cls, values, grads, **kwargs):
    """How far one step moves tensors of these values."""
    params = [torch.nn.Parameter(torch.tensor(it, device=backend.device)) for it in values]
    optimizer = backend.make(cls, params, lr=1.0, **kwargs)
    for param, grad in zip(params, grads, strict=True):
        param.grad = torch.tensor(grad, device=backend.device)
    optimizer.step()
    return [
        (param.detach().cpu().double() - torch.tensor(before).double()).norm().item()
        for param, before in zip(params, values, strict=True)
    ]


def test_lamb_moves_a_tensor_by_lr_times_its_norm(backend):
    found = moved_by(backend, fusedopt.FusedLAMB, [[3.0, 4.0], [0.5]], [[7.0, -1.0], [1e-3]])
    assert found == pytest.approx([5.0, 0.5])


def test_lars_moves_a_tensor_by_a_share_of_its_norm(backend):
    options = {"trust_coefficient": 0.1, "always_adapt": True}
    found = moved_by(
        backend, fusedopt.FusedLARS, [[3.0, 4.0], [0.5]], [[7.0, -1.0], [9.0]], **options
    )
    assert found == pytest.approx([0.5, 0.05])


@each_adapted
def test_the_ratio_of_a_norm_of_zero_is_1(backend, case):
    """A tensor of zeros can leave zero, and one with gradients of zeros is not divided by them."""
    options = {"weight_decay": 0.0, "always_adapt": True}
    start = moved_by(backend, case.cls, [[0.0, 0.0], [2.0]], [[3.0, 4.0], [0.0]], **options)
    plain = moved_by(backend, case.cls, [[0.0, 0.0], [2.0]], [[3.0, 4.0], [0.0]], weight_decay=0.0)
    assert start == plain and start[0] > 0 and start[1] == 0


@each_adapted
def test_a_group_without_weight_decay_is_not_adapted(backend, case):
    """Unless it asks for it: biases and norms train as with Adam, or as with SGD."""
    cls = {fusedopt.FusedLAMB: fusedopt.FusedAdamW, fusedopt.FusedLARS: fusedopt.FusedSGD}[case.cls]
    plain = moved_by(backend, cls, [[3.0, 4.0]], [[0.1, 0.2]], weight_decay=0.0)
    without = moved_by(backend, case.cls, [[3.0, 4.0]], [[0.1, 0.2]], weight_decay=0.0)
    options = {"weight_decay": 0.0, "always_adapt": True}
    adapted = moved_by(backend, case.cls, [[3.0, 4.0]], [[0.1, 0.2]], **options)
    assert without == pytest.approx(plain, rel=1e-5)
    assert adapted != pytest.approx(plain, rel=1e-5)


def test_stable_adamw_is_slower_where_gradients_are_larger_than_usual(backend):
    """With one gradient of another size per tensor, after some steps of the usual size."""
    grads = [1.0] * 5 + [10.0]
    params = [torch.nn.Parameter(torch.ones(4, device=backend.device)) for _ in range(2)]
    options = {"lr": 0.1, "weight_decay": 0.0, "betas": (0.0, 0.9), "eps": 1e-12}
    ours = backend.make(fusedopt.FusedStableAdamW, params[:1], **options)
    plain = backend.make(fusedopt.FusedAdamW, params[1:], **options)
    moved = []
    for grad in grads:
        before = [param.detach().clone() for param in params]
        for param in params:
            param.grad = torch.full_like(param, grad)
        ours.step()
        plain.step()
        moved.append([(old - it.detach())[0].item() for old, it in zip(before, params)])
    for with_brake, without in moved[:-1]:
        assert with_brake == pytest.approx(without, rel=1e-5)
    usual = sum(0.1 * 0.9**age * grad**2 for age, grad in enumerate(reversed(grads)))
    rms = 10 / math.sqrt(usual / (1 - 0.9 ** len(grads)))
    assert moved[-1][0] == pytest.approx(moved[-1][1] / rms, rel=1e-4) and rms > 2


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e19, 1e30])
def test_squares_neither_overflow_nor_vanish(backend, scale):
    """LARS moves by a share of the parameter's norm, whatever the gradient's is."""
    options = {"eps": 0.0, "always_adapt": True, "trust_coefficient": 0.5}
    grads = [[scale, -2 * scale, scale]]
    found = moved_by(backend, fusedopt.FusedLARS, [[1.0, 2.0, 2.0]], grads, **options)
    assert found == pytest.approx([1.5], rel=1e-5)
    values = [[scale, -2 * scale, scale]]
    found = moved_by(backend, fusedopt.FusedLARS, values, [[1.0, 2.0, 2.0]], **options)
    assert found == pytest.approx([0.5 * math.sqrt(6) * scale], rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "dampening": 0.1}], ids=str)
def test_nesterov_without_momentum_is_refused(options):
    with pytest.raises(ValueError, match="nesterov=True with momentum="):
        fusedopt.FusedLARS(make_params(), nesterov=True, **options)


@pytest.mark.racecheck
@each_case
@pytest.mark.parametrize("limit", LIMITS, ids=str)
def test_bits_with_a_limit_that_adapts(backend, case, limit):
    """A limit clips before the ratio is taken. With `Unit`, a gradient has several factors."""
    shapes = [(700, 33), (3, 20000), (555,), (4, 5), ()]
    run_both(backend, case, torch.float32, steps=5, shapes=shapes, max_grad_norm=limit)


@pytest.mark.racecheck
@each_case
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_with_telemetry(backend, case, dtype):
    """In one pass and in two, as telemetry's sums have their own lanes."""
    shapes = [(555,), (33333,), (0,), (16385,)]
    for options in ({}, {"max_grad_norm": 1.0}):
        found = []
        for make in (
            backend.make,
            lambda cls, params, **kw: cls(params, backend="reference", **kw),
        ):
            params = make_params(shapes, dtype, backend.device)
            optimizer = make(case.cls, params, telemetry=3, **case.kwargs, **options)
            for seed in range(3):
                set_grads(params, seed)
                if seed == 1:
                    params[0].grad = None
                optimizer.step()
            found.append((tensors_of(optimizer), optimizer._rings.tensors()))
        (fused, rings), (reference, expected) = found
        assert_same_bits(fused, reference)
        for ours, theirs in zip(rings, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@each_case
def test_a_skipped_step_leaves_every_bit(backend, case):
    """The decision is taken before the first pass writes moments."""
    params = make_params(device=backend.device)
    optimizer = backend.make(case.cls, params, nonfinite="skip", **case.kwargs)
    set_grads(params, 0)
    optimizer.step()
    before = snapshot(optimizer)
    set_grads(params, 1)
    params[-2].grad[-1] = math.nan
    optimizer.step()
    assert optimizer.step_skipped
    assert_same_bits(tensors_of(optimizer), before)


@each_case
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads_gives_the_same_bits(case, threads):
    before = torch.get_num_threads()
    found = []
    for number in (1, threads):
        params = make_params([(278011,), (5,), (70000,)])
        optimizer = case.cls(params, **case.kwargs)
        try:
            torch.set_num_threads(number)
            for seed in range(2):
                set_grads(params, seed)
                optimizer.step()
        finally:
            torch.set_num_threads(before)
        found.append(tensors_of(optimizer))
    assert_same_bits(*found)
