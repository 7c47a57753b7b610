"""Steps with inf or nan in gradients: skip, raise, or propagate."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from cases import CLASSES, DTYPES, assert_same_bits, make_params, set_grads, snapshot, tensors_of

import fusedopt

BAD = [math.inf, -math.inf, math.nan]
SIZES = [1, 16384, 16385, 33333]
SHAPES = [(7,), (16385,), (1,)]


def set_bad_grads(params, seed, bad, value=math.nan):
    """Writes the value to these gradients; `bad` has (parameter, element) pairs."""
    set_grads(params, seed)
    for index, element in bad:
        params[index].grad.view(-1)[element] = value


@pytest.mark.parametrize("value", BAD, ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("position", range(3))
def test_one_bad_element_anywhere_skips_all(backend, position, size, value):
    shapes = [(5,), (40,)]
    shapes.insert(position, (size,))
    params = make_params(shapes, device=backend.device)
    optimizer = backend.make(fusedopt.FusedAdam, params, nonfinite="skip")
    set_grads(params, 0)
    optimizer.step()
    before = snapshot(optimizer)
    for count, element in enumerate(sorted({0, size // 2, size - 1}), start=1):
        set_bad_grads(params, 1, [(position, element)], value)
        optimizer.step()
        assert optimizer.step_skipped and optimizer.skipped_steps == count
        assert not optimizer.grad_norm.isfinite()
        assert_same_bits(tensors_of(optimizer), before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_training_goes_on_as_if_the_bad_step_had_not_been(backend, case, dtype):
    params = make_params(SHAPES, dtype, backend.device)
    twins = make_params(SHAPES, dtype, backend.device)
    skipping = backend.make(case.cls, params, max_grad_norm=1.0, **case.kwargs)
    untroubled = backend.make(case.cls, twins, max_grad_norm=1.0, **case.kwargs)
    for seed in range(4):
        set_bad_grads(params, seed, [(1, 16384)], math.inf)
        skipping.step()
        set_grads(params, seed)
        set_grads(twins, seed)
        skipping.step()
        untroubled.step()
        assert not skipping.step_skipped
        assert_same_bits(tensors_of(skipping), tensors_of(untroubled))
    assert skipping.skipped_steps == 4


@pytest.mark.parametrize("kwargs", [{"nonfinite": "skip"}, {"max_grad_norm": 1.0}], ids=str)
def test_bad_first_step_leaves_no_state(backend, kwargs):
    if backend.device == "cuda":
        pytest.skip("the host doesn't wait for the device to learn of a skip")
    params = make_params(SHAPES, device=backend.device)
    optimizer = backend.make(fusedopt.FusedAdam, params, **kwargs)
    before = snapshot(optimizer)
    set_bad_grads(params, 0, [(0, 3)])
    optimizer.step()
    assert not optimizer.state
    assert_same_bits(tensors_of(optimizer), before)


def test_state_of_a_skipped_first_step_is_in_no_checkpoint(backend):
    """Where the host does not wait, the state is there, but unused."""
    for case in CLASSES:
        if case.cls is fusedopt.FusedAdagrad:  # its constructor makes the state, as torch's
            continue
        params = make_params(SHAPES, device=backend.device)
        optimizer = backend.make(case.cls, params, nonfinite="skip", **case.kwargs)
        set_bad_grads(params, 0, [(0, 3)])
        optimizer.step()
        if backend.device == "cpu":  # as if it hadn't waited
            optimizer._provisional_state.add(optimizer._prepare()[1])
        assert not optimizer.state_dict()["state"]
        assert list(optimizer.state) == params  # a captured graph may use it
        set_grads(params, 1)
        optimizer.step()
        assert list(optimizer.state_dict()["state"]) == [0, 1, 2]


def test_bad_first_gradient_of_a_late_parameter_leaves_it_without_state(backend):
    if backend.device == "cuda":
        pytest.skip("the host doesn't wait for the device to learn of a skip")
    params = make_params(SHAPES, device=backend.device)
    optimizer = backend.make(fusedopt.FusedAdam, params, nonfinite="skip")
    set_grads(params[:2], 0)
    optimizer.step()
    before = snapshot(optimizer)
    set_bad_grads(params, 1, [(2, 0)])
    optimizer.step()
    assert_same_bits(tensors_of(optimizer), before)
    set_grads(params, 2)
    optimizer.step()
    assert optimizer.state[params[0]]["step"] == 2 and optimizer.state[params[2]]["step"] == 1


@pytest.mark.parametrize("named", [False, True])
def test_raise_names_exactly_the_bad_parameters(backend, named):
    params = make_params(SHAPES, device=backend.device)
    rows = [("w", params[0]), ("b.0", params[1]), ("b.1", params[2])] if named else params
    groups = [{"params": rows[:1]}, {"params": rows[1:]}]
    optimizer = backend.make(fusedopt.FusedAdam, groups, nonfinite="raise")
    set_grads(params, 0)
    optimizer.step()
    before = snapshot(optimizer)
    set_bad_grads(params, 1, [(0, 6), (2, 0)])
    with pytest.raises(fusedopt.NonFiniteGradientError) as caught:
        optimizer.step()
    where = ["parameter 0 of param group 0", "parameter 1 of param group 1"]
    expected = [f"'w' ({where[0]})", f"'b.1' ({where[1]})"] if named else where
    assert caught.value.names == expected
    assert all(name in str(caught.value) for name in expected)
    assert optimizer.step_skipped and optimizer.skipped_steps == 1
    assert_same_bits(tensors_of(optimizer), before)
    set_grads(params, 1)
    optimizer.step()
    assert not optimizer.step_skipped and optimizer.skipped_steps == 1


def test_raise_at_the_first_step_leaves_no_state(backend):
    params = make_params(SHAPES, device=backend.device)
    optimizer = backend.make(fusedopt.FusedRMSprop, params, nonfinite="raise")
    before = snapshot(optimizer)
    set_bad_grads(params, 0, [(1, 5)])
    with pytest.raises(fusedopt.NonFiniteGradientError):
        optimizer.step()
    assert not optimizer.state
    assert_same_bits(tensors_of(optimizer), before)


def test_raise_names_parameters_with_gaps_and_gradients_of_other_dtypes(backend):
    wide = torch.randn(6, 10, device=backend.device)
    params = [wide[:, ::2].detach().requires_grad_(), *make_params([(9,)], device=backend.device)]
    params[1].grad_dtype = None
    optimizer = backend.make(fusedopt.FusedAdam, params, nonfinite="raise")
    params[0].grad = torch.ones(6, 5, device=backend.device)
    params[1].grad = torch.full((9,), math.inf, dtype=torch.bfloat16, device=backend.device)
    kept = wide.clone()
    with pytest.raises(fusedopt.NonFiniteGradientError) as caught:
        optimizer.step()
    assert caught.value.names == ["parameter 1 of param group 0"]
    assert torch.equal(wide, kept)


def test_error_is_a_runtime_error_that_survives_pickling():
    error = fusedopt.NonFiniteGradientError(["'a'", "'b'"], "'a', 1 nan of 3; 'b', 2 inf of 4")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is fusedopt.NonFiniteGradientError and isinstance(again, RuntimeError)
    assert (again.names, str(again)) == (error.names, str(error))


@pytest.mark.parametrize("telemetry", [None, 3])
def test_message_of_many_bad_parameters_stays_short(backend, telemetry):
    params = make_params([(4,)] * 1000, device=backend.device)
    optimizer = backend.make(
        fusedopt.FusedAdam,
        [(f"layer.{i}", param) for i, param in enumerate(params)],
        nonfinite="raise",
        telemetry=telemetry,
    )
    set_bad_grads(params, 0, [(i, 2) for i in range(1000)], math.inf)
    with pytest.raises(fusedopt.NonFiniteGradientError, match=r"layer\.0.*1 inf of 4") as caught:
        optimizer.step()
    assert len(caught.value.names) == 1000
    assert len(str(caught.value)) < 300 and "997 more" in str(caught.value)


@pytest.mark.parametrize("value", BAD, ids=str)
@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_propagate_gives_what_torch_gives(backend, case, value):
    params = make_params([(7,), (3,)], device=backend.device)
    twins = make_params([(7,), (3,)], device=backend.device)
    fused = backend.make(case.cls, params, nonfinite="propagate", **case.kwargs)
    twin = case.twin(twins, foreach=False, **case.kwargs)
    for optimizer in (fused, twin):
        set_bad_grads(optimizer.param_groups[0]["params"], 0, [(0, 2)], value)
        optimizer.step()
    # These take signs alone: 1 of inf, and 0 of nan.
    takes_signs = issubclass(case.cls, fusedopt.FusedLion | fusedopt.FusedRprop)
    assert params[0][2].isfinite() == takes_signs
    assert not fused.step_skipped and fused.skipped_steps == 0
    torch.testing.assert_close(tensors_of(fused), tensors_of(twin), equal_nan=True)


@pytest.mark.parametrize(
    ("kwargs", "skips"),
    [
        ({}, False),
        ({"max_grad_norm": 1.0}, True),
        ({"max_grad_norm": math.inf}, True),
        ({"max_grad_norm": 1.0, "nonfinite": "propagate"}, False),
        ({"nonfinite": "skip"}, True),
    ],
    ids=str,
)
def test_default_is_to_skip_where_a_limit_is_set(backend, kwargs, skips):
    params = make_params(SHAPES, device=backend.device)
    optimizer = backend.make(fusedopt.FusedAdam, params, **kwargs)
    set_bad_grads(params, 0, [(0, 0)])
    optimizer.step()
    assert bool(optimizer.step_skipped) == skips


def test_mode_may_change_between_steps(backend):
    params = make_params(SHAPES, device=backend.device)
    optimizer = backend.make(fusedopt.FusedAdam, params, nonfinite="skip")
    set_bad_grads(params, 0, [(0, 0)])
    optimizer.step()
    optimizer.nonfinite = "raise"
    with pytest.raises(fusedopt.NonFiniteGradientError):
        optimizer.step()
    optimizer.nonfinite = None
    optimizer.step()
    assert not optimizer.step_skipped and optimizer.skipped_steps == 2


def test_propagate_with_a_limit_multiplies_all_by_nan(backend):
    """As clip_grad_norm_ does: a norm of nan gives a coefficient of nan."""
    params = make_params([(7,), (3,)], device=backend.device)
    optimizer = backend.make(fusedopt.FusedAdam, params, max_grad_norm=1.0, nonfinite="propagate")
    set_bad_grads(params, 0, [(0, 2)])
    optimizer.step()
    assert all(p.isnan().all() for p in params)
