"""A step unscales and skips as a gradient scaler asks."""

from __future__ import annotations

import math

import pytest
import torch
from cases import CLASSES, assert_same_bits, make_params, set_grads, snapshot, tensors_of

import fusedopt

SHAPES = [(7,), (16385,), (1,)]


@pytest.mark.parametrize("kwargs", [{}, {"max_grad_norm": 0.5}, {"nonfinite": "raise"}], ids=str)
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@pytest.mark.parametrize("scale", [65536.0, 0.25])
@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_unscaling_equals_dividing_the_gradients(backend, case, scale, shape, kwargs):
    """Powers of two: nothing is rounded."""
    params = make_params(SHAPES, device=backend.device)
    twins = make_params(SHAPES, device=backend.device)
    scaled = backend.make(case.cls, params, **case.kwargs, **kwargs)
    plain = backend.make(case.cls, twins, **case.kwargs, **kwargs)
    scaled.grad_scale = torch.full(shape, scale, device=backend.device)
    scaled.found_inf = torch.zeros(shape, device=backend.device)
    for seed in range(2):
        set_grads(params, seed, scale=scale)
        set_grads(twins, seed)
        given = [p.grad.clone() for p in params]
        scaled.step()
        plain.step()
        assert_same_bits(tensors_of(scaled), tensors_of(plain))
        assert all(torch.equal(p.grad, grad) for p, grad in zip(params, given))
    torch.testing.assert_close(scaled.grad_norm, plain.grad_norm)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_scale_that_is_no_power_of_two_gives_the_bits_of_the_reference(backend, dtype):
    params = make_params(SHAPES, torch.float64, backend.device)
    twins = make_params(SHAPES, torch.float64, backend.device)
    fused = backend.make(fusedopt.FusedAdam, params)
    reference = fusedopt.FusedAdam(twins, backend="reference")
    for optimizer in (fused, reference):
        optimizer.grad_scale = torch.tensor(1000.1, dtype=dtype, device=backend.device)
        set_grads(optimizer.param_groups[0]["params"], 0, scale=1000)
        optimizer.step()
    assert_same_bits(tensors_of(fused), tensors_of(reference))


def test_scale_of_zero_gives_no_finite_gradient(backend):
    for make in (backend.make, lambda cls, params: cls(params, backend="reference")):
        params = make_params([(3,)], device=backend.device)
        optimizer = make(fusedopt.FusedAdam, params)
        optimizer.grad_scale = torch.zeros((), device=backend.device)
        set_grads(params, 0)
        optimizer.step()
        assert optimizer.grad_norm.isinf() and params[0].isnan().all()


def test_unscaling_float16(backend):
    params = make_params([(555,)], torch.float16, backend.device)
    twins = make_params([(555,)], torch.float32, backend.device)
    for twin, param in zip(twins, params):
        twin.data.copy_(param.data)
    fused = backend.make(fusedopt.FusedAdam, params, max_grad_norm=1.0)
    fused.grad_scale = torch.tensor(65536.0, device=backend.device)
    params[0].grad = torch.linspace(-60000, 60000, 555, device=backend.device).half()
    twins[0].grad = params[0].grad.float() / 65536
    twin = torch.optim.Adam(twins, foreach=False)
    fused.step()
    norm = torch.nn.utils.clip_grad_norm_(twins, 1.0)
    twin.step()
    torch.testing.assert_close(fused.grad_norm, norm)
    torch.testing.assert_close(params[0].float(), twins[0], rtol=2.0**-10, atol=1e-6)


@pytest.mark.parametrize("value", [1.0, 2.0, 0.5, math.inf, math.nan])
@pytest.mark.parametrize("mode", ["skip", "raise", "propagate", None])
def test_found_inf_skips_in_every_mode_without_raising(backend, mode, value):
    params = make_params(SHAPES, device=backend.device)
    optimizer = backend.make(fusedopt.FusedAdam, params, nonfinite=mode)
    set_grads(params, 0)
    optimizer.step()
    before = snapshot(optimizer)
    optimizer.found_inf = torch.tensor(value, device=backend.device)
    for seed in (1, 2):
        set_grads(params, seed)
        if seed == 2:
            params[0].grad[0] = math.nan
        optimizer.step()
        assert optimizer.step_skipped and optimizer.skipped_steps == seed
        assert_same_bits(tensors_of(optimizer), before)
    optimizer.found_inf = torch.zeros(1, device=backend.device)
    set_grads(params, 3)
    optimizer.step()
    assert not optimizer.step_skipped and optimizer.state[params[0]]["step"] == 2


@pytest.mark.parametrize("fused", [None, True])
def test_stock_scaler_unscales_once(backend, fused):
    """Also with `fused=True`: torch's own class would then ask the scaler not to unscale."""
    params = make_params([(555,)], device=backend.device)
    twins = make_params([(555,)], device=backend.device)
    optimizer = backend.make(fusedopt.FusedAdam, params, max_grad_norm=0.5, fused=fused)
    twin = backend.make(fusedopt.FusedAdam, twins, max_grad_norm=0.5)
    scaler = torch.amp.GradScaler(backend.device, init_scale=1024.0)
    for scale in (1.0, math.nan, 1.0):
        scaler.scale((params[0] * params[0].detach() * scale).sum()).backward()
        (twins[0] * twins[0].detach() * scale).sum().backward()
        scaler.unscale_(optimizer)
        assert torch.equal(params[0].grad.isnan(), twins[0].grad.isnan())
        scaler.step(optimizer)
        scaler.update()
        twin.step()
        optimizer.zero_grad()
        twin.zero_grad()
    assert_same_bits(tensors_of(optimizer), tensors_of(twin))
    assert not getattr(optimizer, "_step_supports_amp_scaling", False)
