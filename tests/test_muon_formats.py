"""FusedMuon has the reference's bits under every limit and in every format."""

from __future__ import annotations

import math

import pytest
import torch
from cases import assert_same_bits, make_params, set_grads, tensors_of
from limited import LIMITS, SCALES
from torch.nn import Parameter

import fusedopt

# Square, tall and wide, some alike; more than a chunk; a row, a column, and an empty one.
SHAPES = [(8, 8), (24, 5), (8, 8), (5, 24), (130, 127), (1, 3), (3, 1), (0, 4), (24, 5)]
LR = {"lr": 0.02}


@pytest.mark.racecheck
@pytest.mark.parametrize("limit", [None, 20.0, *LIMITS], ids=str)
def test_bits_of_the_reference(backend, limit):
    assert_bits_of_the_reference(backend, limit, torch.float32)


FORMATS = [
    (torch.float64, {}),
    (torch.float16, {}),
    (torch.float32, {"state_dtype": torch.bfloat16}),
    (torch.bfloat16, {"master_weights": "exact"}),
    (torch.bfloat16, {"master_weights": "24bit", "rounding": "stochastic"}),
    (torch.float16, {"state_dtype": torch.float32, "master_weights": "24bit"}),
]


@pytest.mark.parametrize(("dtype", "formats"), FORMATS, ids=str)
def test_bits_of_the_reference_in_other_formats(backend, dtype, formats):
    assert_bits_of_the_reference(backend, 20.0, dtype, **formats)


def assert_bits_of_the_reference(backend, limit, dtype, **formats):
    """On one device, where torch's products are the same."""
    found = []
    for name in ("compiled", "reference"):
        params = make_params(SHAPES, dtype)
        groups = [{"params": params[::2]}, {"params": params[1::2], "nesterov": False, "lr": 0.1}]
        options = {**LR, "max_grad_norm": limit, "telemetry": len(SCALES), **formats}
        if name == "compiled":
            opt = backend.make(fusedopt.FusedMuon, groups, **options)
        else:
            opt = fusedopt.FusedMuon(groups, backend=name, **options)
        readings = []
        for step, scale in enumerate(SCALES):
            set_grads(params, step, scale)
            if step == 3:
                params[2].grad = None
            if step == 5:
                params[0].data = params[0].data.clone()
            if limit is not None or not math.isnan(scale):
                opt.step()
            readings.append(opt._readings().clone())
        found.append({**tensors_of(opt), **opt.telemetry().columns()})
        found[-1]["readings"] = torch.stack(readings)
    assert_same_bits(*found)


def test_16_bit_matrices_with_masters_train_as_float32(backend):
    values = [p.detach().bfloat16() for p in make_params(SHAPES)]
    halves = [Parameter(it.clone()) for it in values]
    singles = [Parameter(it.float()) for it in values]
    ours = backend.make(fusedopt.FusedMuon, halves, master_weights="exact", lr=1e-3)
    ours.param_groups[0]["state_dtype"] = torch.float32
    others = backend.make(fusedopt.FusedMuon, singles, lr=1e-3)
    for step in range(6):
        set_grads(halves, step)
        for a, b in zip(halves, singles, strict=True):
            b.grad = a.grad.float()
        ours.step()
        others.step()
    masters = fusedopt.master_weights(ours).values()
    for half, master, single in zip(halves, masters, singles, strict=True):
        torch.testing.assert_close(master, single.detach(), rtol=0, atol=1e-4)
        torch.testing.assert_close(half.detach(), master.bfloat16(), rtol=1e-2, atol=0)


def test_gradients_of_another_dtype(backend):
    """They stay as they are: a parameter may forbid gradients of its own dtype."""
    halves = [Parameter(it.detach().half()) for it in make_params(SHAPES)]
    singles = [Parameter(it.detach().float()) for it in halves]
    ours = backend.make(fusedopt.FusedMuon, halves, **LR)
    others = backend.make(fusedopt.FusedMuon, singles, **LR)
    for step in range(3):
        set_grads(singles, step)
        for half, single in zip(halves, singles, strict=True):
            half.grad, half.grad_dtype = None, torch.float32
            half.grad = single.grad.clone()
        kept = [(half.grad, half.grad.clone()) for half in halves]
        ours.step()
        others.step()
        for half, (grad, value) in zip(halves, kept, strict=True):
            assert half.grad is grad and torch.equal(grad, value)
    for half, single in zip(halves, singles, strict=True):
        torch.testing.assert_close(half.detach().float(), single.detach(), rtol=0, atol=0.02)


@pytest.mark.parametrize(("dtype", "formats"), FORMATS, ids=str)
def test_torch_goes_on_with_our_states(dtype, formats):
    params, others = make_params(SHAPES, dtype), make_params(SHAPES)
    ours = fusedopt.FusedMuon(params, **LR, **formats)
    torchs = torch.optim.Muon(others, **LR)
    for step in range(2):
        set_grads(params, step)
        ours.step()
    masters = fusedopt.master_weights(ours) if "master_weights" in formats else {}
    torchs.load_state_dict(fusedopt.convert.to_torch(ours))
    for param, other in zip(params, others, strict=True):
        other.data = masters.get(param, param).detach().to(torch.float32, copy=True)
        found = ours.state[param]["momentum_buffer"].float()
        assert torch.equal(torchs.state[other]["momentum_buffer"], found)
    for opt, its in ((ours, params), (torchs, others)):
        set_grads(its, 2)
        opt.step()
    for param, other in zip(params, others, strict=True):
        torch.testing.assert_close(param.float(), other, rtol=0.02, atol=0.01)
