"""SGD's first-step rule: the first gradient of a momentum buffer is not dampened."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from cases import assert_same_bits, make_params, set_grads, tensors_of

import fusedopt

SHAPES = [(33,), (16385,)]
KWARGS = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}


def params_of(optimizer):
    return optimizer.param_groups[0]["params"]


def train(optimizer, seeds):
    for seed in seeds:
        set_grads(params_of(optimizer), seed)
        optimizer.step()


def make_both(backend, **kwargs):
    """Our optimizer and torch's, with equal parameters."""
    params, twins = (make_params(SHAPES, torch.float64, backend.device) for _ in range(2))
    return (
        backend.make(fusedopt.FusedSGD, params, **{**KWARGS, **kwargs}),
        torch.optim.SGD(twins, foreach=False, **{**KWARGS, **kwargs}),
    )


def assert_close(fused, twin):
    torch.testing.assert_close(tensors_of(fused), tensors_of(twin))


def test_first_gradient_is_the_buffer(backend):
    fused, _ = make_both(backend, dampening=0.25)
    train(fused, [0])
    for param in params_of(fused):
        assert torch.equal(fused.state[param]["momentum_buffer"], param.grad)


def test_state_is_torchs(backend):
    for kwargs in ({}, {"momentum": 0, "dampening": 0}, {"nesterov": True, "dampening": 0}):
        fused, twin = make_both(backend, **kwargs)
        train(fused, range(3))
        train(twin, range(3))
        assert_close(fused, twin)
        mine, theirs = fused.state_dict()["state"], twin.state_dict()["state"]
        assert {k: set(v) for k, v in mine.items()} == {k: set(v) for k, v in theirs.items()}


def test_overflow_at_the_first_step_is_not_the_first_step(backend):
    fused, twin = make_both(backend)
    fused.nonfinite = "skip"
    for seed in range(2):
        set_grads(params_of(fused), seed)
        params_of(fused)[1].grad[-1] = math.inf
        fused.step()
        assert fused.step_skipped
    if backend.device == "cpu":
        assert not fused.state
    assert not fused.state_dict()["state"]
    train(fused, range(3))
    train(twin, range(3))
    assert_close(fused, twin)


def test_momentum_switched_on_and_off(backend):
    fused, twin = make_both(backend, momentum=0, dampening=0)
    seeds = iter(range(100))
    for momentum, dampening in [(0, 0), (0.9, 0.5), (0, 0.5), (0.5, 0.9), (0, 0)]:
        for optimizer in (fused, twin):
            optimizer.param_groups[0].update(momentum=momentum, dampening=dampening)
        for seed in (next(seeds), next(seeds)):
            train(fused, [seed])
            train(twin, [seed])
            assert_close(fused, twin)


def test_late_gradients_have_their_own_first_step(backend):
    fused, twin = make_both(backend)
    for seed, missing in enumerate([0, 0, None, 1, None]):
        for optimizer in (fused, twin):
            set_grads(params_of(optimizer), seed)
            if missing is not None:
                params_of(optimizer)[missing].grad = None
            optimizer.step()
        assert_close(fused, twin)


@pytest.mark.parametrize("missing", ["absent", "none", "empty"])
def test_checkpoint_without_buffers(backend, missing):
    """torch writes such checkpoints: with momentum=0 the key is absent, or None in older ones."""
    fused, twin = make_both(backend)
    checkpoint = fused.state_dict()
    if missing != "absent":
        entry = {"momentum_buffer": None} if missing == "none" else {}
        checkpoint["state"] = {0: dict(entry), 1: dict(entry)}
    fused.load_state_dict(checkpoint)
    twin.load_state_dict(checkpoint)
    train(fused, range(3))
    train(twin, range(3))
    assert_close(fused, twin)


def test_loaded_buffers_are_not_new(backend):
    fused, twin = make_both(backend)
    train(twin, range(1))
    for param, value in zip(params_of(fused), params_of(twin)):
        param.data.copy_(value.data)
    fused.load_state_dict(copy.deepcopy(twin.state_dict()))
    train(fused, [1, 2])
    train(twin, [1, 2])
    assert_close(fused, twin)


def test_copy_knows_whether_its_buffers_are_new(backend):
    fused, _ = make_both(backend)
    train(fused, [0])
    again = copy.deepcopy(fused)
    for optimizer in (fused, again):
        train(optimizer, [1, 2])
    assert_same_bits(tensors_of(again), tensors_of(fused))


def test_state_cleared_in_mid_training_starts_anew(backend):
    fused, twin = make_both(backend)
    for optimizer in (fused, twin):
        train(optimizer, [0, 1])
        optimizer.state.clear()
        train(optimizer, [2, 3])
    assert_close(fused, twin)
