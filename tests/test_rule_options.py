"""Options of the rules that torch's classes don't have: the formulas of Keras and optax."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from cases import DTYPES, assert_same_bits, make_params, set_grads, tensors_of

import fusedopt

SHAPES = [(7,), (3, 300), (16385,)]
LR_IN_MOMENTUM = {"lr_in_momentum": True, "momentum": 0.9}
DECOUPLED = {"decoupled_weight_decay": True, "weight_decay": 0.1}
CASES = [
    (fusedopt.FusedAdam, {"eps_hat": True, "eps": 0.1}),
    (fusedopt.FusedAdam, {"eps_hat": True, "eps": 0.1, "amsgrad": True, **DECOUPLED}),
    (fusedopt.FusedRMSprop, {"eps_in_sqrt": True, "eps": 0.1, "centered": True}),
    (fusedopt.FusedRMSprop, {**LR_IN_MOMENTUM, **DECOUPLED}),
    (fusedopt.FusedSGD, DECOUPLED),
    (fusedopt.FusedSGD, {**LR_IN_MOMENTUM, **DECOUPLED, "dampening": 0.5}),
    (fusedopt.FusedSGD, {**LR_IN_MOMENTUM, "nesterov": True}),
    (fusedopt.FusedSGD, {"lr_in_momentum": True}),
]
each_case = pytest.mark.parametrize(("cls", "options"), CASES, ids=str)


def run(make, device, options, dtype=torch.float32):
    params = make_params(SHAPES, dtype, device)
    optimizer = make([{"params": params, **options}], max_grad_norm=5.0)
    for seed, lr in enumerate([0.1, 0.0, 0.02]):
        optimizer.param_groups[0]["lr"] = lr
        set_grads(params, seed)
        optimizer.step()
    return tensors_of(optimizer)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_case
def test_bits_are_those_of_the_reference(backend, cls, options, dtype):
    results = [
        run(make, backend.device, options, dtype)
        for make in (partial(backend.make, cls), partial(cls, backend="reference"))
    ]
    assert_same_bits(*results)


@each_case
def test_each_option_changes_the_step(backend, cls, options):
    """But for the learning rate in a momentum that there isn't."""
    make = partial(backend.make, cls)
    found = run(make, backend.device, options)
    for name in {"eps_hat", "eps_in_sqrt", "lr_in_momentum", "decoupled_weight_decay"} & {*options}:
        expected = run(make, backend.device, {**options, name: False})
        same = all(torch.equal(found[key], expected[key]) for key in found)
        assert same == (name == "lr_in_momentum" and "momentum" not in options), name
