"""FusedMuon refuses by name what it can't step, and changes nothing."""

from __future__ import annotations

import math

import pytest
from cases import assert_same_bits, make_params, set_grads, snapshot, tensors_of

import fusedopt

SHAPES = [(8, 8), (24, 5), (5, 24)]


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)], ids=str)
def test_other_than_matrices_are_refused_by_name(shape):
    good = make_params([(3, 3)])
    with pytest.raises(ValueError, match=r"parameter 1 of param group 0 has shape .*matrices"):
        fusedopt.FusedMuon([*good, *make_params([shape])])
    opt = fusedopt.FusedMuon(good)
    with pytest.raises(ValueError, match=r"parameter 0 of param group 1 has shape .*FusedAdamW"):
        opt.add_param_group({"params": make_params([shape])})
    assert len(opt.param_groups) == 1


WRONG = [
    ("ns_steps", 100),
    ("ns_steps", 2.0),
    ("adjust_lr_fn", "adamw"),
    ("ns_coefficients", (1.0, 2.0)),
    ("ns_coefficients", 3.0),
    ("eps", "small"),
    ("eps", b"1"),
    ("eps", 1e300),
    ("eps", math.nan),
    ("ns_coefficients", (1e300, 1.0, 1.0)),
    ("weight_decay", math.nan),
    ("weight_decay", -1.0),
    ("lr", math.nan),
    ("lr", None),
]


@pytest.mark.parametrize(("key", "value"), WRONG, ids=str)
def test_wrong_options_change_nothing(backend, key, value):
    params = make_params(SHAPES)
    opt = backend.make(fusedopt.FusedMuon, params)
    set_grads(params, 0)
    opt.step()
    before = snapshot(opt)
    opt.param_groups[0][key] = value
    with pytest.raises((TypeError, ValueError), match=f"param group.*({key}|learning rate)"):
        opt.step()
    assert_same_bits(tensors_of(opt), before)
    del opt.param_groups[0][key]
    with pytest.raises(ValueError, match=f"param group 0 has no '{key}'"):
        opt.step()
    assert_same_bits(tensors_of(opt), before)


def test_states_of_8_bits_are_refused():
    params = make_params([(3, 3)])
    with pytest.raises(ValueError, match="muon has 'momentum_buffer', which can't have 8 bits"):
        fusedopt.FusedMuon(params, state_dtype="8bit")


def test_a_sharded_matrix_is_refused_by_name(monkeypatch):
    """A DTensor is known by its attributes."""
    param = make_params([(4, 4)])[0]
    param.placements, param._local_tensor = (), param.detach()
    with pytest.raises(ValueError, match="parameter 0 of param group 0 is a DTensor"):
        fusedopt.FusedMuon([param])
