"""Limits that adapt themselves, over checkpoints: they go on, or begin anew."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from cases import assert_same_bits, make_params, snapshot
from limited import LEARNING, SCALES, run

import fusedopt
from fusedopt.clip import PerTensor, ZScore


@pytest.mark.parametrize("limit", LEARNING, ids=str)
def test_a_checkpoint_goes_on(backend, limit):
    params = make_params(device=backend.device)
    optimizer = backend.make(fusedopt.FusedAdam, params, max_grad_norm=limit)
    run(optimizer, params, SCALES[:6])
    twins = [p.detach().clone().requires_grad_() for p in params]
    resumed = backend.make(fusedopt.FusedAdam, twins, max_grad_norm=limit)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert run(optimizer, params, SCALES[6:], 6)[1][1:] == run(resumed, twins, SCALES[6:], 6)[1][1:]
    assert_same_bits(snapshot(optimizer), snapshot(resumed))


def test_checkpoints_with_and_without():
    params = make_params()
    adapts = fusedopt.FusedAdam(params, max_grad_norm=ZScore())
    run(adapts, params, SCALES[:3])
    saved = adapts.state_dict()
    twin = torch.optim.Adam(params)
    twin.load_state_dict(saved)  # looks past what it doesn't know
    fixed = fusedopt.FusedAdam(params, max_grad_norm=1.0)
    fixed.load_state_dict(saved)
    assert "clip" not in fixed.state_dict()
    adapts.load_state_dict(twin.state_dict())
    assert adapts._own["clip_state"] is None  # learns anew
    other = fusedopt.FusedAdam(params, max_grad_norm=ZScore(threshold=3.0))
    other.load_state_dict(saved)
    assert other._own["clip_state"] is None
    saved["clip"]["state"] = torch.zeros(2)
    with pytest.raises(ValueError, match=r"state of ZScore.*float64 tensor of shape \(3,\)"):
        fusedopt.FusedAdam(params, max_grad_norm=ZScore()).load_state_dict(saved)


def learned(limit, steps=4):
    params = make_params([(4, 2), (3,)])
    optimizer = fusedopt.FusedAdam(params, max_grad_norm=limit)
    run(optimizer, params, SCALES[:steps])
    return params, copy.deepcopy(optimizer.state_dict())


@pytest.mark.parametrize("limit", LEARNING, ids=str)
def test_a_count_that_no_step_has_left_is_refused(limit):
    params, saved = learned(limit)
    for bad in (-3.0, 0.5, 1e300, math.inf, math.nan):
        saved["clip"]["state"].view(-1)[0] = bad
        other = fusedopt.FusedAdam(params, max_grad_norm=limit)
        with pytest.raises(ValueError, match="expected whole numbers of steps, and no nan"):
            other.load_state_dict(saved)
    assert other._own["clip_state"] is None and not other.state


def test_equal_limits_know_each_other_in_a_checkpoint():
    params, saved = learned(ZScore(max_norm=2, warmup=2))
    other = fusedopt.FusedAdam(params, max_grad_norm=ZScore(max_norm=2.0, warmup=2))
    other.load_state_dict(saved)
    assert other._own["clip_state"][0] == 4


def test_a_checkpoint_whose_memory_is_laid_out_otherwise(backend):
    limit = PerTensor(warmup=2)
    params, saved = learned(limit)
    expected = saved["clip"]["state"].clone()
    saved["clip"]["state"] = expected.t().contiguous().t()
    params = [torch.nn.Parameter(p.detach().to(backend.device)) for p in params]
    other = backend.make(fusedopt.FusedAdam, params, max_grad_norm=limit)
    other.load_state_dict(saved)
    run(other, params, [1.0])
    assert other._own["clip_state"].is_contiguous()
    assert (other._own["clip_state"][:, 0] == expected[:, 0] + 1).all()


def test_a_checkpoint_that_is_loaded_in_inference_mode():
    limit = PerTensor(warmup=2)
    params, saved = learned(limit)
    other = fusedopt.FusedAdam(params, backend="reference", max_grad_norm=limit)
    with torch.inference_mode():
        other.load_state_dict(saved)
    run(other, params, [1.0])
    assert (other._own["clip_state"][:, 0] == 5).all()
