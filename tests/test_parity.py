"""Every backend gives the bits of the reference."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import CASES, CLASSES, DTYPES, assert_same_bits, make_params, set_grads, tensors_of

import fusedopt


def run_both(backend, case, dtype, steps=3, scale=3.0, shapes=None, **kwargs):
    """Takes the same steps on a backend and on the reference, and compares the bits after each."""
    options = {} if shapes is None else {"shapes": shapes}
    params = make_params(dtype=dtype, device=backend.device, **options)
    expected = [p.detach().clone().requires_grad_() for p in params]
    fused = backend.make(case.cls, params, **case.kwargs, **kwargs)
    reference = case.cls(expected, backend="reference", **case.kwargs, **kwargs)
    for step in range(steps):
        set_grads(params, step, scale)
        for p, q in zip(params, expected):
            q.grad = p.grad.clone()
        fused.step()
        reference.step()
        assert_same_bits(tensors_of(fused), tensors_of(reference))
        assert_same_bits(readings(fused), readings(reference))
    return fused


def readings(optimizer):
    names = ("grad_norm", "step_skipped", "skipped_steps")
    return {name: getattr(optimizer, name) for name in names}


@pytest.mark.racecheck
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bits_with_clipping(backend, case, dtype):
    optimizer = run_both(backend, case, dtype, max_grad_norm=1.0)
    assert optimizer.grad_norm > 1


@pytest.mark.racecheck
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_bits_in_one_pass(backend, case, dtype):
    """Without clipping or a check, the update pass measures the norm."""
    run_both(backend, case, dtype)


@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_bits_below_the_limit(backend, case):
    optimizer = run_both(backend, case, torch.float32, max_grad_norm=1e6)
    assert optimizer.grad_norm < 1e6


@pytest.mark.parametrize("shape", [(65537,), (278011,), (3 * 16384,)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_of_large_tensors(backend, shape, dtype):
    run_both(backend, CASES[0], dtype, steps=2, shapes=[shape], max_grad_norm=0.5)


def test_bits_of_many_tensors(backend):
    """More gradient pointers than fit in a kernel's arguments of either size."""
    for count in (450, 500, 4500):
        run_both(
            backend, CASES[0], torch.float32, steps=2, shapes=[(5,)] * count, max_grad_norm=0.5
        )
        run_both(backend, CASES[0], torch.float32, steps=2, shapes=[(5,)] * count)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bits_of_subnormal_and_huge_values(backend, case):
    for scale in (1e-42, 1e-20, 1e25):
        run_both(backend, case, torch.float32, scale=scale, max_grad_norm=1.0, shapes=[(555,)])


@pytest.mark.parametrize("limit", [None, 1.0])
def test_bits_where_the_caller_flushes_subnormal_numbers(backend, limit):
    """torch.set_flush_denormal switches one thread's, a library built with -ffast-math some."""
    if backend.name == "emulated":
        pytest.skip("the emulated kernels compute as their thread does")
    shapes = [(555,), (200_000,)]  # several threads
    params = make_params(shapes, device=backend.device)
    expected = make_params(shapes, device=backend.device)
    fused = backend.make(fusedopt.FusedSGD, params, momentum=0.9, max_grad_norm=limit)
    reference = fusedopt.FusedSGD(expected, backend="reference", momentum=0.9, max_grad_norm=limit)
    for seed, scale in enumerate([1e-39, 3e38 if limit else 1e-41]):
        set_grads(params, seed, scale)
        set_grads(expected, seed, scale)
        for p, q in zip(params, expected):
            p.grad.clamp_(-3e38, 3e38)
            q.grad.clamp_(-3e38, 3e38)
        if not torch.set_flush_denormal(True):
            pytest.skip("this processor doesn't flush them")
        try:
            fused.step()
        finally:
            torch.set_flush_denormal(False)
        reference.step()
        assert_same_bits(tensors_of(fused), tensors_of(reference))
        assert fused.grad_norm == reference.grad_norm


COUNTING = [case for case in CLASSES if "step" in case.cls.rule.scalars]


@pytest.mark.parametrize("case", COUNTING, ids=str)
def test_bits_after_many_steps(backend, case):
    """Bias corrections by repeated squaring, at a step count that takes many squarings."""
    params = make_params([(100,)], device=backend.device)
    fused = backend.make(case.cls, params)
    set_grads(params, 0)
    fused.step()
    fused.state[params[0]]["step"].fill_(1_234_567)
    expected = [p.detach().clone().requires_grad_() for p in params]
    reference = case.cls(expected, backend="reference")
    reference.load_state_dict(copy.deepcopy(fused.state_dict()))
    for seed in range(3):
        set_grads(params, seed)
        set_grads(expected, seed)
        fused.step()
        reference.step()
    assert_same_bits(tensors_of(fused), tensors_of(reference))
    assert fused.state[params[0]]["step"] == 1_234_570


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_where_the_rectification_of_radam_begins(backend, dtype):
    case = next(case for case in CLASSES if case.cls is fusedopt.FusedRAdam)
    run_both(backend, case, dtype, steps=8, shapes=[(555,)], max_grad_norm=1.0)


@pytest.mark.racecheck
@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_bits_of_mixed_dtypes_and_groups(backend, case):
    """Several groups with options of their own, several dtypes in each."""

    def groups():
        params = [
            make_params([(33,), (700,)], dtype=dtype, device=backend.device) for dtype in DTYPES
        ]
        return [
            {"params": [p for of_dtype in params for p in of_dtype[:1]], "lr": 0.5},
            {"params": [p for of_dtype in params for p in of_dtype[1:]], "weight_decay": 0.3},
        ]

    fused = backend.make(case.cls, groups(), max_grad_norm=1.0, **case.kwargs)
    reference = case.cls(groups(), backend="reference", max_grad_norm=1.0, **case.kwargs)
    for seed in range(3):
        for optimizer in (fused, reference):
            for index, group in enumerate(optimizer.param_groups):
                set_grads(group["params"], 2 * seed + index)
            optimizer.step()
        assert_same_bits(tensors_of(fused), tensors_of(reference))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("wide_state", [False, True])
@pytest.mark.parametrize("wide_grad", [False, True])
@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_bits_of_16_bits_with_float32_gradients_or_state(
    backend, case, half, wide_state, wide_grad
):
    params = make_params([(700,), (17000,)], dtype=half, device=backend.device)
    expected = [p.detach().clone().requires_grad_() for p in params]
    fused = backend.make(case.cls, params, max_grad_norm=1.0, **case.kwargs)
    reference = case.cls(expected, backend="reference", max_grad_norm=1.0, **case.kwargs)
    for optimizer in (fused, reference):
        for p in optimizer.param_groups[0]["params"]:
            if wide_grad:
                p.grad_dtype = None  # lets a gradient of another dtype be assigned
            p.grad = torch.zeros_like(p)
        optimizer.step()
        for p in optimizer.param_groups[0]["params"]:
            for key, value in optimizer.state[p].items():
                if wide_state and value.shape == p.shape:
                    optimizer.state[p][key] = value.float()
    for seed in range(3):
        for optimizer in (fused, reference):
            generator = torch.Generator().manual_seed(seed)
            for p in optimizer.param_groups[0]["params"]:
                grad = torch.randn(p.shape, generator=generator).to(backend.device)
                p.grad = grad if wide_grad else grad.to(half)
            optimizer.step()
        assert_same_bits(tensors_of(fused), tensors_of(reference))
        assert fused.grad_norm == reference.grad_norm
