"""An adaptive limit learns from the right steps, and from the right parameters."""

from __future__ import annotations

import math

import pytest
import torch
from cases import assert_same_bits, make_params, set_grads
from limited import LEARNING, SCALES, UNITS, run

import fusedopt
from fusedopt.clip import Percentile, PerTensor, ZScore
from fusedopt.core.limit_state import KEY


def test_a_layer_that_joins_later_warms_up(backend):
    params = make_params([(30,), (20,)], device=backend.device)
    optimizer = backend.make(fusedopt.FusedSGD, params, lr=0.1, max_grad_norm=PerTensor(warmup=2))
    for step in range(4):
        set_grads(params, step)
        if step < 2:
            params[1].grad = None
        optimizer.step()
    assert optimizer._own["clip_state"][:, 0].tolist() == [4, 2]
    late = make_params([(5, 5)], device=backend.device)
    optimizer.add_param_group({"params": late})
    set_grads([*params, *late], 9)
    params[0].grad.zero_()  # teaches nothing
    optimizer.step()
    assert optimizer._own["clip_state"][:, 0].tolist() == [4, 3, 1]


@pytest.mark.parametrize("nonfinite", [None, "propagate"])
@pytest.mark.parametrize("limit", LEARNING, ids=str)
def test_bad_steps_teach_nothing(backend, limit, nonfinite):
    params = make_params(device=backend.device)
    optimizer = backend.make(fusedopt.FusedAdam, params, max_grad_norm=limit, nonfinite=nonfinite)
    run(optimizer, params, [1.0, 1.1, 0.9, 1.0, 1.0])
    before = optimizer._own["clip_state"].clone()
    run(optimizer, params, [math.nan, math.inf])
    assert torch.equal(optimizer._own["clip_state"], before)


def test_another_limit_learns_anew(backend):
    params = make_params(device=backend.device)
    optimizer = backend.make(fusedopt.FusedAdam, params, max_grad_norm=ZScore(warmup=2))
    run(optimizer, params, SCALES[:3])
    optimizer.max_grad_norm = ZScore(warmup=2)
    assert optimizer._own["clip_state"][0] == 3
    optimizer.max_grad_norm = Percentile()
    run(optimizer, params, SCALES[:2])
    assert optimizer._own["clip_state"][0] == 2
    optimizer.max_grad_norm = 1.0
    run(optimizer, params, SCALES[:1])


def test_unscaled_norms_are_learned(backend):
    params = make_params(device=backend.device)
    states = []
    for scale in (1.0, 1024.0):
        optimizer = backend.make(fusedopt.FusedAdam, params, max_grad_norm=ZScore(warmup=2))
        optimizer.grad_scale = torch.tensor(scale, device=backend.device)
        run(optimizer, params, [scale * it for it in (1.0, 1.5, 1.25)])
        states.append(optimizer._own["clip_state"])
    assert torch.equal(*states)


@pytest.mark.parametrize("limit", LEARNING, ids=str)
def test_norms_of_zero_teach_nothing(backend, limit):
    """A limit of zero would clip everything to zero, and learn nothing else ever after."""
    params = make_params(UNITS, device=backend.device)
    optimizer = backend.make(fusedopt.FusedSGD, params, max_grad_norm=limit)
    _, coefs = run(optimizer, params, [0.0] * 6 + [1.0, 1.0])
    assert min(coefs) > 0
    twins = make_params(UNITS, device=backend.device)
    reference = fusedopt.FusedSGD(twins, max_grad_norm=limit, backend="reference")
    run(reference, twins, [1.0, 1.0], first=6)
    ours, expected = optimizer._own["clip_state"], reference._own["clip_state"]
    assert_same_bits({"state": ours.cpu()}, {"state": expected.cpu()})


def test_what_is_known_of_a_parameter_goes_along_with_it(backend):
    params = make_params([(30,), (5,), (7,)], device=backend.device)
    groups = [{"params": [param]} for param in params]
    limit = PerTensor(warmup=1, max_norm=100.0)
    optimizer = backend.make(fusedopt.FusedSGD, groups, lr=0.1, max_grad_norm=limit)
    run(optimizer, params, [1.0, 1.0])
    known = optimizer._own["clip_state"].clone()
    optimizer.param_groups.pop(0)
    assert torch.equal(optimizer.state_dict()["param_groups"][0][KEY]["state"], known[1:])
    optimizer.param_groups.pop(0)
    late = make_params([(9,)], device=backend.device)
    optimizer.add_param_group({"params": late})
    run(optimizer, [params[2], *late], [0.5])
    state = optimizer._own["clip_state"]
    assert state[:, 0].tolist() == [3, 1]
    average, norm = known[2, 1].item(), params[2].grad.norm().item()
    expected = 0.98 * average + 0.02 * min(norm, 1.05 * average)
    assert state[0, 1].item() == pytest.approx(expected, rel=1e-6)
