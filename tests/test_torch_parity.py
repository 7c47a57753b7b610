"""The reference and the CPU backend against torch.optim, within its tests' tolerances."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, SHAPES, make_params, set_grads, tensors_of


def tolerances(case, dtype):
    """torch's own tolerances; larger for a centered variance, which is a difference."""
    if case.kwargs.get("centered") and dtype == torch.float32:
        return {"rtol": 1e-4, "atol": 1e-5}
    return {}


@pytest.mark.parametrize("backend_name", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_seven_steps_as_torch(case, dtype, backend_name):
    params, twins = make_params(dtype=dtype), make_params(dtype=dtype)
    fused = case.cls(params, backend=backend_name, **case.kwargs)
    twin = case.twin(twins, foreach=False, **case.kwargs)
    for step in range(7):
        set_grads(params, step)
        set_grads(twins, step)
        if step == 3:  # a frozen layer, and one without a gradient
            params[3].grad = twins[3].grad = None
            params[4].requires_grad = twins[4].requires_grad = False
        fused.step()
        twin.step()
    torch.testing.assert_close(tensors_of(fused), tensors_of(twin), **tolerances(case, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_16_bits_as_torch_in_float32_rounded_once(case, dtype):
    params = make_params(dtype=dtype)
    fused = case.cls(params, **case.kwargs)
    wide = [p.detach().float().requires_grad_() for p in params]
    twin = case.twin(wide, foreach=False, **case.kwargs)
    set_grads(params, 0)
    for p, w in zip(params, wide):
        p.grad += torch.sign(p.grad)  # none that its weight decay could cancel
        w.grad = p.grad.float()
    fused.step()
    twin.step()
    # float32 results that differ in the last place may round apart: one unit of the 16-bit type.
    rtol = torch.finfo(dtype).eps
    actual = {name: value.float() for name, value in tensors_of(fused).items()}
    # Rprop's step is a state of 16 bits itself. LAMB and StableAdamW compute their updates from the
    # rounded moments.
    names = ("FusedLAMB", "FusedRprop", "FusedStableAdamW")
    atol = 0.1 * rtol if case.cls.__name__ in names else 1e-6
    torch.testing.assert_close(actual, tensors_of(twin), rtol=rtol, atol=atol)


@pytest.mark.parametrize("limit", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_clipping_as_torch(case, limit):
    params, twins = make_params(dtype=torch.float64), make_params(dtype=torch.float64)
    fused = case.cls(params, max_grad_norm=limit, **case.kwargs)
    twin = case.twin(twins, foreach=False, **case.kwargs)
    for step in range(3):
        set_grads(params, step)
        set_grads(twins, step)
        fused.step()
        norm = torch.nn.utils.clip_grad_norm_(twins, limit)
        twin.step()
        torch.testing.assert_close(fused.grad_norm, norm.float())
    torch.testing.assert_close(tensors_of(fused), tensors_of(twin))


def test_shapes_hold_empty_tensors_first_last_and_between():
    assert SHAPES[0] == SHAPES[-1] == (0,) and (0, 4) in SHAPES
