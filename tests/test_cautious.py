"""The option `cautious`: which elements move, how far, and how an optimizer keeps the option."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from cases import (
    DTYPES,
    FusedCautiousAdamW,
    FusedCautiousLion,
    assert_same_bits,
    make_params,
    set_grads,
    snapshot,
    tensors_of,
)
from test_trainer_wrappers import WRAPPERS

import fusedopt
from fusedopt import convert

CLASSES = [(fusedopt.FusedAdamW, FusedCautiousAdamW), (fusedopt.FusedLion, FusedCautiousLion)]
each_class = pytest.mark.parametrize("cls", [cls for cls, _ in CLASSES])


def steps(optimizer, seeds):
    params = optimizer.param_groups[0]["params"]
    for seed in seeds:
        set_grads(params, seed)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("cls", "of_the_table"), CLASSES)
def test_the_option_is_the_rule_of_the_table(backend, cls, of_the_table, dtype):
    """tests/cases.py has the two rules as classes."""
    found = []
    for make, option in ((cls, {"cautious": True}), (of_the_table, {})):
        params = make_params([(555,), (16385,)], dtype, backend.device)
        optimizer = backend.make(make, params, max_grad_norm=1.0, **option)
        found.append(tensors_of(steps(optimizer, range(3))))
    assert_same_bits(*found)


def moves(backend, cls, options, *steps_grads):
    """By how much the last step moves zeros, by element."""
    param = torch.nn.Parameter(torch.zeros(len(steps_grads[0]), device=backend.device))
    optimizer = backend.make(cls, [param], weight_decay=0.0, **options)
    for grads in steps_grads:
        before = param.detach().clone()
        param.grad = torch.tensor(grads, device=backend.device)
        optimizer.step()
    return (param.detach() - before).tolist()


@each_class
def test_what_disagrees_stays_and_the_others_move_farther(backend, cls):
    """The average of the first three is still positive, and so is their update."""
    grads = [1.0, 1.0, 1.0, -1.0], [0.1, -0.1, 0.0, -1.0]
    options = {"lr": 0.5, "betas": (0.9, 0.9)}
    plain = moves(backend, cls, options, *grads)
    cautious = moves(backend, cls, options | {"cautious": True}, *grads)
    assert cautious[1:3] == [0.0, 0.0] and plain[1] < 0 and plain[2] < 0
    assert cautious[0] == pytest.approx(2 * plain[0], rel=1e-6)
    assert cautious[3] == pytest.approx(2 * plain[3], rel=1e-6) and plain[3] > 0


@each_class
def test_where_all_agree_the_bits_are_those_without_the_option(backend, cls):
    """As in a first step from averages of 0. The share is exactly 1."""
    found = []
    for cautious in (False, True):
        params = make_params([(3,), (777,), (20011,)], torch.float64, backend.device)
        optimizer = backend.make(cls, params, cautious=cautious)
        found.append(tensors_of(steps(optimizer, [0])))
    assert_same_bits(*found)


@each_class
def test_the_others_move_at_most_a_thousand_times_as_far(backend, cls):
    """One element of 5,000 agrees: a share of 0.0002, which counts as 0.001."""
    grads = [1.0] * 5000, [0.1] + [-0.1] * 4999
    options = {"lr": 0.5, "betas": (0.9, 0.9)}
    plain = moves(backend, cls, options, *grads)
    cautious = moves(backend, cls, options | {"cautious": True}, *grads)
    assert cautious[0] == pytest.approx(1000 * plain[0], rel=1e-5)
    assert set(cautious[1:]) == {0.0}


@each_class
def test_nothing_moves_where_nothing_agrees(backend, cls):
    options = {"lr": 0.5, "betas": (0.9, 0.9), "cautious": True}
    assert moves(backend, cls, options, [1.0, -2.0], [-0.1, 0.1]) == [0.0, 0.0]


@each_class
def test_tiny_gradients_agree_too(backend, cls):
    """The product of the update and the gradient would vanish."""
    options = {"lr": 0.5, "cautious": True} | ({} if cls is fusedopt.FusedLion else {"eps": 1e-30})
    moved = moves(backend, cls, options, [1e-25, -1e-25])
    assert moved[0] < 0 and moved[1] > 0


@each_class
def test_nan_spreads_as_without_the_option(backend, cls):
    """With nonfinite="propagate", the default."""
    moved = moves(backend, cls, {"cautious": True}, [1.0, float("nan"), 1.0])
    is_nan = [value != value for value in moved]
    # The sign of nan is 0 for Lion, with or without the option.
    assert is_nan == [False, cls is fusedopt.FusedAdamW, False]


@each_class
def test_it_may_be_changed_between_steps(backend, cls):
    params = make_params([(555,), (20011,)], device=backend.device)
    others = [param.detach().clone().requires_grad_() for param in params]
    optimizer = steps(backend.make(cls, params), range(2))
    assert optimizer.cautious is False
    optimizer.cautious = True
    steps(optimizer, range(2, 4))
    optimizer.cautious = False
    steps(optimizer, range(4, 6))
    plain = steps(backend.make(cls, others), range(2))
    cautious = backend.make(cls, others, cautious=True)
    cautious.load_state_dict(plain.state_dict())
    steps(cautious, range(2, 4))
    plain.load_state_dict(cautious.state_dict())
    steps(plain, range(4, 6))
    assert_same_bits(tensors_of(optimizer), tensors_of(plain))


@pytest.mark.parametrize("wrap", WRAPPERS, ids=lambda wrap: wrap.__name__)
@each_class
def test_a_trainers_wrapper_has_it_too(cls, wrap):
    params = make_params([(555,)])
    optimizer = cls(params, cautious=True)
    wrapper = wrap(optimizer)
    assert wrapper.cautious is True and wrapper.rule is optimizer.rule
    set_grads(params, 0)
    wrapper.step()
    wrapper.cautious = False
    assert optimizer.cautious is False and wrapper.rule is optimizer.rule is cls.rule


@each_class
def test_copies_keep_it_and_checkpoints_leave_it(cls):
    optimizer = steps(cls(make_params([(555,)]), cautious=True), range(2))
    saved = optimizer.state_dict()
    assert "cautious" not in saved["param_groups"][0]
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert copied.cautious is True
        found = tensors_of(steps(copied, [2]))
        copied.load_state_dict(saved)
        assert copied.cautious is True
    assert_same_bits(found, tensors_of(steps(optimizer, [2])))
    plain = cls(make_params([(555,)]))
    plain.load_state_dict(saved)
    assert plain.cautious is False


@pytest.mark.parametrize("value", [1, None, "yes", 0.5])
@each_class
def test_other_values_are_refused(cls, value):
    with pytest.raises(TypeError, match=r"cautious is .*; expected True or False"):
        cls(make_params([(3,)]), cautious=value)
    optimizer = steps(cls(make_params([(3,)]), cautious=True), range(1))
    before = snapshot(optimizer)
    with pytest.raises(TypeError, match=r"cautious is .*; expected True or False"):
        optimizer.cautious = value
    assert optimizer.cautious is True
    assert_same_bits(tensors_of(optimizer), before)


@each_class
def test_a_group_has_no_cautious_of_its_own(cls):
    for value in (True, False):
        groups = [{"params": make_params([(3,)]), "cautious": value}]
        with pytest.raises(ValueError, match="param group 0 has 'cautious', which one group can't"):
            cls(groups, cautious=not value)
        assert cls(groups, cautious=value).cautious is value  # ZeroRedundancyOptimizer repeats it


def test_a_decay_of_the_gradient_is_refused():
    groups = [{"params": make_params([(3,)]), "decoupled_weight_decay": False}]
    optimizer = fusedopt.FusedAdamW(groups)
    steps(optimizer, range(1))
    before = snapshot(optimizer)
    optimizer.cautious = True
    with pytest.raises(ValueError, match="param group 0 has decoupled_weight_decay=False, and"):
        optimizer.step()
    assert_same_bits(tensors_of(optimizer), before)


def test_bitsandbytes_and_torchao_have_no_cautious_step():
    optimizer = steps(fusedopt.FusedAdamW(make_params([(3,)]), cautious=True), range(1))
    for function in (convert.to_bitsandbytes, convert.to_torchao):
        with pytest.raises(TypeError, match="a FusedAdamW of the rule cautious_adamw; expected"):
            function(optimizer)
