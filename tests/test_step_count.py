"""After a resume, the number of steps continues from the checkpoint's."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from cases import CLASSES, make_params, set_grads

import fusedopt

SHAPES = [(3,), (4,)]
COUNTING = [case for case in CLASSES if not case.cls.rule.hidden_step]


def make(cls=fusedopt.FusedAdam, **options):
    params = make_params(SHAPES)
    return cls(list(zip("ab", params)), max_grad_norm=100.0, **options), params


def train(optimizer, params, steps):
    for step in range(steps):
        set_grads(params, step)
        optimizer.step()


def checkpoint_after(steps, cls=fusedopt.FusedAdam, **options):
    optimizer, params = make(cls, **options)
    train(optimizer, params, steps)
    return copy.deepcopy(optimizer.state_dict())


@pytest.mark.parametrize("telemetry", [None, 4])
@pytest.mark.parametrize("case", COUNTING, ids=str)
def test_steps_count_on(backend, case, telemetry):
    params = make_params(SHAPES, device=backend.device)
    optimizer = backend.make(case.cls, list(zip("ab", params)), telemetry=telemetry, **case.kwargs)
    optimizer.load_state_dict(checkpoint_after(7, case.cls, **case.kwargs))
    assert optimizer.explain() == "no step has been taken since a checkpoint of step 7 was loaded"
    set_grads(params, 7)
    optimizer.step()
    assert optimizer.explain().startswith("step 8: gradient norm ")
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert copied.explain() == optimizer.explain()
    if telemetry is not None:
        assert optimizer.telemetry().step.tolist() == [8]
        for _ in range(5):
            optimizer.step()
        telemetry = optimizer.telemetry()
        assert telemetry.step.tolist() == [10, 11, 12, 13]
        assert all(it.grad_norm.isfinite().all() for it in telemetry.params.values())


def test_a_skipped_step_counts_from_then_on():
    """Those before the checkpoint are not in its state, and are not known."""
    optimizer, params = make()
    for poisoned in (False, True, False):
        set_grads(params, 0)
        if poisoned:
            params[0].grad[0] = math.nan
        optimizer.step()
    assert optimizer.explain().startswith("step 3: ")
    again, others = make(telemetry=4)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for poisoned in (True, False):
        set_grads(others, 0)
        if poisoned:
            others[0].grad[0] = math.nan
        again.step()
    assert again.telemetry().step.tolist() == [3, 4]
    assert again.telemetry().skipped.tolist() == [True, False]


def test_the_parameter_with_most_steps_counts():
    optimizer, params = make()
    train(optimizer, params[1:], 5)
    train(optimizer, params, 2)
    again, others = make()
    again.load_state_dict(optimizer.state_dict())
    train(again, others, 1)
    assert again.explain().startswith("step 8: ")


def test_an_older_checkpoint_takes_the_count_back():
    saved = checkpoint_after(3)
    optimizer, params = make(telemetry=8)
    train(optimizer, params, 6)
    optimizer.load_state_dict(saved)
    assert optimizer.telemetry().step.tolist() == []
    train(optimizer, params, 2)
    assert optimizer.telemetry().step.tolist() == [4, 5]


def test_a_checkpoint_of_the_same_step_leaves_the_telemetry():
    """As trainers load one that they have just made, to move it to a device."""
    optimizer, params = make(telemetry=8)
    train(optimizer, params, 2)
    params[0].grad[0] = math.nan
    optimizer.step()
    told = optimizer.explain()
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.explain() == told and told.startswith("step 3 skipped")


def test_torchs_checkpoint_counts_too():
    params = make_params(SHAPES)
    twin = torch.optim.NAdam(params)
    for _ in range(4):
        set_grads(params, 0)
        twin.step()
    optimizer = fusedopt.FusedNAdam(params)
    optimizer.load_state_dict(twin.state_dict())
    optimizer.step()
    assert optimizer.explain().startswith("step 5: ")


def test_sgd_has_no_count_in_its_state_and_keeps_its_own():
    optimizer, params = make(fusedopt.FusedSGD, lr=0.1, momentum=0.9, telemetry=4)
    train(optimizer, params, 2)
    optimizer.load_state_dict(checkpoint_after(7, fusedopt.FusedSGD, lr=0.1, momentum=0.9))
    train(optimizer, params, 1)
    assert optimizer.telemetry().step.tolist() == [1, 2, 3]


@pytest.mark.parametrize("step", [1e30, 2**40])
def test_a_count_beyond_all_counting(step):
    saved = checkpoint_after(1)
    saved["state"][0]["step"] = torch.tensor(float(step))
    optimizer, params = make(telemetry=2)
    optimizer.load_state_dict(saved)
    train(optimizer, params, 1)
    assert optimizer.telemetry().step.tolist() == [2**24 + 1]
    assert optimizer.explain().startswith(f"step {2**24 + 1}: ")


# --- a Monitor that is there as the checkpoint is loaded


@pytest.mark.parametrize(
    ("first_step", "expected"), [(None, [1, 2, 8, 9]), (1, [1, 2, 3, 4]), (6, [6, 7, 8, 9])]
)
def test_a_monitor_counts_on_without_a_warning(first_step, expected):
    optimizer, params = make(telemetry=8)
    rows = []
    with fusedopt.Monitor(optimizer, rows.append, first_step=first_step):
        train(optimizer, params, 2)
        optimizer.load_state_dict(checkpoint_after(7))
        train(optimizer, params, 2)
    assert [row["step"] for row in rows] == expected


@pytest.mark.parametrize(("first_step", "expected"), [(None, [8, 9]), (10, [10, 11])])
def test_a_monitor_of_a_resumed_optimizer(first_step, expected, tmp_path):
    optimizer, params = make(telemetry=8)
    optimizer.load_state_dict(checkpoint_after(7))
    with fusedopt.Monitor(optimizer, tmp_path / "run.jsonl", first_step=first_step):
        train(optimizer, params, 2)
    log = fusedopt.read_log(tmp_path / "run.jsonl")
    assert log.telemetry.step.tolist() == expected
