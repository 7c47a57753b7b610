"""Adaptive limits and checkpoints: an equal limit keeps its statistics, others start empty."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from cases import assert_same_bits, make_params, snapshot
from limited import LEARNING, SCALES, run

import fusedopt
from fusedopt.clip import PerTensor, ZScore
from fusedopt.core.limit_state import KEY


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
    saved = copy.deepcopy(adapts.state_dict())
    plain = torch.optim.Adam(params)
    plain.load_state_dict(copy.deepcopy({**saved, "param_groups": plain_groups(saved)}))
    adapts.load_state_dict(plain.state_dict())
    assert adapts._own["clip_state"] is None  # starts empty
    saved["param_groups"][0][KEY]["state"] = torch.zeros(2)
    with pytest.raises(ValueError, match=r"state of ZScore.*float64 tensor of shape \(3,\)"):
        fusedopt.FusedAdam(params, max_grad_norm=ZScore()).load_state_dict(saved)


def plain_groups(saved):
    return [{k: v for k, v in g.items() if k != KEY} for g in saved["param_groups"]]


def test_what_a_limit_has_learned_survives_a_run_with_torchs_optimizer():
    """torch keeps a key of a group that it doesn't know, and the step looks past it."""
    params, saved = learned(ZScore(warmup=2))
    twin = torch.optim.Adam(params)
    twin.load_state_dict(copy.deepcopy(saved))
    twin.step()
    again = fusedopt.FusedAdam(params, max_grad_norm=ZScore(warmup=2))
    again.load_state_dict(copy.deepcopy(twin.state_dict()))
    assert torch.equal(again._own["clip_state"], saved["param_groups"][0][KEY]["state"])
    assert again.param_groups[0].keys() == torch.optim.Adam(params).param_groups[0].keys()


@pytest.mark.parametrize(
    "other", [None, 1.0, ZScore(threshold=3.0, warmup=2), PerTensor()], ids=str
)
def test_what_another_limit_has_learned_is_dropped_with_a_warning(other):
    params, saved = learned(ZScore(warmup=2))
    optimizer = fusedopt.FusedAdam(params, max_grad_norm=other)
    with pytest.warns(RuntimeWarning, match=r"what ZScore\(.*warmup=2.* has learned.*is dropped"):
        optimizer.load_state_dict(saved)
    assert optimizer._own["clip_state"] is None and len(optimizer.state) == 2
    fresh = fusedopt.FusedAdam(params, max_grad_norm=ZScore(warmup=2)).state_dict()
    optimizer.load_state_dict(fresh)  # a limit that has seen no step loses nothing


def test_a_checkpoint_of_version_0_1_goes_on():
    """Its statistics of the limit stand beside the groups, as "clip"."""
    params, saved = learned(PerTensor(warmup=2))
    learned_then = saved["param_groups"][0].pop(KEY)
    old = {**saved, "clip": {key: learned_then[key] for key in ("limit", "state")}}
    other = fusedopt.FusedAdam(params, max_grad_norm=PerTensor(warmup=2))
    other.load_state_dict(old)
    assert torch.equal(other._own["clip_state"], learned_then["state"])


@pytest.mark.parametrize("version", ["0.1", "now", "distributed"])
def test_what_a_limit_has_learned_of_a_parameter_is_found_by_its_name(version):
    params = make_params([(4, 2), (3,), (5,)])
    named = list(zip("abc", params))
    optimizer = fusedopt.FusedAdam(named, max_grad_norm=PerTensor(warmup=2))
    run(optimizer, params, SCALES[:4])
    saved = copy.deepcopy(optimizer.state_dict())
    state = saved["param_groups"][0][KEY]["state"]
    assert len({tuple(row) for row in state.tolist()}) == 3
    if version == "0.1":
        saved["clip"] = saved["param_groups"][0].pop(KEY)
        del saved["clip"]["param_names"]
    elif version == "distributed":  # it has the parameters in the order of the other optimizer
        saved["state"] = {"abc"[i]: it for i, it in saved["state"].items()}
        saved["param_groups"][0]["params"] = ["c", "a", "b"]
    other = fusedopt.FusedAdam([named[2], named[0], named[1]], max_grad_norm=PerTensor(warmup=2))
    other.load_state_dict(saved)
    assert torch.equal(other._own["clip_state"], state[[2, 0, 1]])
    assert all(
        torch.equal(other.state[p]["exp_avg"], optimizer.state[p]["exp_avg"]) for p in params
    )
    assert other.param_groups[0]["param_names"] == ["c", "a", "b"]


@pytest.mark.parametrize("limit", LEARNING, ids=str)
def test_a_checkpoint_before_the_first_step_has_what_is_learned_later(limit):
    """Distributed checkpoints are read into the tensors of such a one."""
    params, saved = learned(limit)
    fresh = fusedopt.FusedAdam(params, max_grad_norm=limit).state_dict()
    key = fresh["param_groups"][0][KEY]
    assert key["state"].shape == saved["param_groups"][0][KEY]["state"].shape
    assert not key["state"].any()


def learned(limit, steps=4):
    params = make_params([(4, 2), (3,)])
    optimizer = fusedopt.FusedAdam(params, max_grad_norm=limit)
    run(optimizer, params, SCALES[:steps])
    return params, copy.deepcopy(optimizer.state_dict())


@pytest.mark.parametrize("limit", LEARNING, ids=str)
def test_a_count_that_no_step_has_left_is_refused(limit):
    params, saved = learned(limit)
    for bad in (-3.0, 0.5, 1e300, math.inf, math.nan):
        saved["param_groups"][0][KEY]["state"].view(-1)[0] = bad
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
    expected = saved["param_groups"][0][KEY]["state"].clone()
    saved["param_groups"][0][KEY]["state"] = expected.t().contiguous().t()
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
