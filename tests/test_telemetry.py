"""Telemetry has the last steps' measurements by name, and doesn't change the step."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from cases import CASES, CLASSES, DTYPES, assert_same_bits, make_params, set_grads, tensors_of

import fusedopt

LIMITS = [{}, {"max_grad_norm": 1.0}]


def named(params):
    return [(f"p{i}", param) for i, param in enumerate(params)]


def columns_of(optimizer):
    return {name: value.double() for name, value in optimizer.telemetry().columns().items()}


def plant(params, step):
    """Removes some gradients, and writes inf and nan to others in one step."""
    params[2].grad = None if step != 1 else params[2].grad
    if step == 2:
        params[6].grad[5] = torch.inf
        params[7].grad[16384] = torch.nan
        params[7].grad[7] = -torch.inf


@pytest.mark.racecheck
@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_bits_of_the_reference(backend, case, dtype, limits):
    params = make_params(dtype=dtype, device=backend.device)
    twins = [p.detach().clone().requires_grad_() for p in params]
    options = {**case.kwargs, **limits, "telemetry": 3, "nonfinite": "skip" if limits else None}
    ours = backend.make(case.cls, named(params), **options)
    reference = case.cls(named(twins), backend="reference", **options)
    for step in range(5):
        set_grads(params, step, scale=3.0)
        plant(params, step)
        for param, twin in zip(params, twins):
            twin.grad = None if param.grad is None else param.grad.clone()
        ours.step()
        reference.step()
        assert_same_bits(columns_of(ours), columns_of(reference))
    assert ours.telemetry().step.tolist() == [3, 4, 5]
    assert ours.telemetry().skipped.tolist() == [bool(limits), False, False]


@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_changes_nothing(backend, case, dtype, limits):
    optimizers = []
    for options in ({}, {"telemetry": 2}):
        params = make_params(dtype=dtype, device=backend.device)
        optimizer = backend.make(case.cls, params, **case.kwargs, **limits, **options)
        for step in range(4):
            set_grads(params, step, scale=3.0)
            plant(params, step)
            optimizer.step()
        optimizers.append(optimizer)
    assert_same_bits(tensors_of(optimizers[0]), tensors_of(optimizers[1]))
    assert optimizers[0].grad_norm.equal(optimizers[1].grad_norm)


@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_float64_says(backend, dtype, limits):
    params = make_params(dtype=dtype, device=backend.device)
    optimizer = backend.make(fusedopt.FusedAdam, named(params), telemetry=1, **limits)
    for step in range(3):
        set_grads(params, step, scale=3.0)
        before = [param.detach().double().clone() for param in params]
        optimizer.step()
        telemetry = optimizer.telemetry()
        for i, param in enumerate(params):
            found = telemetry.params[f"p{i}"]
            grad, update = param.grad.double(), param.detach().double() - before[i]
            expected = {
                "grad_norm": grad.norm(),
                "grad_max": grad.abs().max() if param.numel() else torch.zeros(()),
                "infs": torch.zeros(()),
                "nans": torch.zeros(()),
                "update_norm": update.norm(),
                "param_norm": before[i].norm(),
                "update_ratio": update.norm() / before[i].norm() if update.any() else 0.0,
            }
            assert found.numel == param.numel()
            for name, value in expected.items():
                actual = getattr(found, name)[0].item()
                in_float32 = name != "grad_max" and dtype != torch.float64
                rel = 1e-7 if in_float32 else 1e-12
                assert actual == pytest.approx(float(value), rel=rel), (name, i)
        assert telemetry.step.item() == step + 1
        assert telemetry.grad_norm.float().item() == optimizer.grad_norm.item()


def test_a_planted_explosion(backend):
    params = make_params(device=backend.device)
    optimizer = backend.make(fusedopt.FusedAdamW, named(params), max_grad_norm=1.0, telemetry=8)
    for step in range(6):
        set_grads(params, step)
        if step == 4:
            params[9].grad[20000:20003] = torch.inf
            params[9].grad[-1] = torch.nan
        optimizer.step()
    telemetry = optimizer.telemetry()
    assert telemetry.skipped.tolist() == [False] * 4 + [True, False]
    for i in range(len(params)):
        it = telemetry.params[f"p{i}"]
        assert it.infs.tolist() == [0, 0, 0, 0, 3 if i == 9 else 0, 0]
        assert it.nans.tolist() == [0, 0, 0, 0, 1 if i == 9 else 0, 0]
        assert it.update_norm[4] == 0 and it.update_ratio[4] == 0 and it.param_norm[4].isnan()
    assert telemetry.params["p9"].grad_max[4].isnan()
    assert telemetry.params["p9"].grad_norm[4].isnan()
    words = optimizer.explain()
    assert "step 5 skipped: p9, 3 inf and 1 nan of 33.3k" in words
    assert "of the last 6 steps 1 were skipped, 5 clipped" in words


def test_unscaled(backend):
    params = make_params(device=backend.device)
    optimizer = backend.make(fusedopt.FusedAdam, named(params), max_grad_norm=1.0, telemetry=1)
    set_grads(params, 0)
    plain = [param.grad.clone() for param in params]
    for param in params:
        param.grad *= 1024
    optimizer.grad_scale = torch.full((), 1024.0, device=backend.device)
    optimizer.step()
    telemetry = optimizer.telemetry()
    for i, grad in enumerate(plain):
        largest = grad.abs().max().item() if grad.numel() else 0.0
        assert telemetry.params[f"p{i}"].grad_max.item() == largest
    assert telemetry.grad_norm.float().item() == optimizer.grad_norm.item()


def test_learning_rates(backend):
    params = make_params(device=backend.device)
    lr = torch.tensor(0.5, device=backend.device)
    groups = [{"params": params[:5], "lr": 0.25}, {"params": params[5:], "lr": lr}]
    optimizer = backend.make(fusedopt.FusedAdam, groups, telemetry=4)
    for step in range(2):
        set_grads(params, step)
        optimizer.step()
        lr.mul_(0.5)
    assert optimizer.telemetry().lr.tolist() == [[0.25, 0.5], [0.25, 0.25]]


def test_more_parameters_later(backend):
    params = make_params(device=backend.device)
    optimizer = backend.make(fusedopt.FusedAdam, named(params[:9]), telemetry=3)
    set_grads(params, 0)
    optimizer.step()
    before = columns_of(optimizer)
    optimizer.add_param_group({"params": [("late", params[9])]})
    set_grads(params, 1)
    optimizer.step()
    after = columns_of(optimizer)
    assert_same_bits({name: after[name][:1] for name in before}, before)
    assert after["grad_norm/late"].isnan().tolist() == [True, False]
    assert after["lr/1"].isnan().tolist() == [True, False]


def test_a_shared_and_an_unnamed_parameter(backend):
    params = make_params([(3,), (4,)], device=backend.device)
    optimizer = backend.make(fusedopt.FusedAdam, params, telemetry=2)
    set_grads(params, 0)
    optimizer.step()
    assert list(optimizer.telemetry().params) == [
        "parameter 0 of param group 0",
        "parameter 1 of param group 0",
    ]


def test_one_name_for_two_parameters(backend):
    params = make_params([(3,), (4,)], device=backend.device)
    groups = [{"params": [("w", params[0])]}, {"params": [("w", params[1])]}]
    optimizer = backend.make(fusedopt.FusedAdam, groups, telemetry=2)
    set_grads(params, 0)
    optimizer.step()
    telemetry = optimizer.telemetry()
    assert list(telemetry.params) == ["w", "parameter 0 of param group 1"]
    assert [it.numel for it in telemetry.params.values()] == [3, 4]


def test_before_the_first_step(backend):
    params = make_params(device=backend.device)
    optimizer = backend.make(fusedopt.FusedAdam, params, telemetry=2)
    telemetry = optimizer.telemetry()
    assert telemetry.step.shape == (0,) and len(telemetry.params) == len(params)
    assert optimizer.explain() == "no step has been taken yet"


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_copies_go_on_by_themselves(duplicate):
    params = make_params()
    optimizer = fusedopt.FusedAdam(named(params), telemetry=4)
    set_grads(params, 0)
    optimizer.step()
    twin = duplicate(optimizer)
    assert_same_bits(columns_of(twin), columns_of(optimizer))
    set_grads(twin.param_groups[0]["params"], 1)
    twin.step()
    assert len(twin.telemetry().step) == 2 and len(optimizer.telemetry().step) == 1


def test_a_checkpoint_leaves_it_alone(backend):
    params = make_params(device=backend.device)
    optimizer = backend.make(fusedopt.FusedAdam, named(params), telemetry=4)
    set_grads(params, 0)
    optimizer.step()
    before = columns_of(optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    assert_same_bits(columns_of(optimizer), before)
    set_grads(params, 1)
    optimizer.step()
    assert optimizer.telemetry().step.tolist() == [1, 2]


def test_a_copy_on_its_way(backend):
    params = make_params(device=backend.device)
    optimizer = backend.make(fusedopt.FusedAdam, named(params), telemetry=4)
    set_grads(params, 0)
    optimizer.step()
    pending = optimizer.telemetry(non_blocking=True)
    set_grads(params, 1)
    optimizer.step()
    assert pending.result().step.tolist() == [1]
    assert pending.done()
    assert optimizer.telemetry().step.tolist() == [1, 2]


def test_without_it(backend):
    optimizer = backend.make(fusedopt.FusedAdam, make_params(device=backend.device))
    with pytest.raises(RuntimeError, match=r"FusedAdam keeps no telemetry.*telemetry=N"):
        optimizer.telemetry()


@pytest.mark.parametrize("name", ["telemetry", "max_consecutive_skips"])
@pytest.mark.parametrize(
    ("value", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)]
)
def test_refused(name, value, error):
    with pytest.raises(error, match=f"{name}.*expected an int > 0 or None"):
        fusedopt.FusedAdam([torch.zeros(1)], **{name: value})


def test_too_many_skips_in_a_row(backend):
    params = make_params(device=backend.device)
    optimizer = backend.make(
        fusedopt.FusedAdam, named(params), max_grad_norm=1.0, max_consecutive_skips=2, telemetry=4
    )

    late = backend.name == "cuda"  # a step learns of the one before it, and not of itself

    def step(broken):
        set_grads(params, 0)
        if broken:
            params[6].grad[0] = torch.nan
        if late:
            torch.cuda.synchronize()
        optimizer.step()

    def step_too_many(message):
        if late:
            step(True)
        with pytest.raises(fusedopt.TooManySkipsError, match=message):
            step(True)

    for broken in (True, False, True):
        step(broken)
    step_too_many(r"2 steps in a row.*p6, 1 nan of 16.4k")
    step_too_many("2 steps in a row")
    step(False)
    optimizer.max_consecutive_skips = None
    for _ in range(3):
        step(True)
    assert optimizer.skipped_steps == 7 + 2 * late


def test_a_million_rows_are_one_ring():
    """Memory is made once, whatever the number of steps."""
    param = torch.nn.Parameter(torch.zeros(3))
    optimizer = fusedopt.FusedSGD([param], lr=1e-3, telemetry=5)
    param.grad = torch.ones(3)
    for _ in range(3):
        optimizer.step()
    before = [tensor.data_ptr() for tensor in optimizer._rings.tensors()]
    for _ in range(2000):
        optimizer.step()
    assert [tensor.data_ptr() for tensor in optimizer._rings.tensors()] == before
    assert optimizer.telemetry().step.tolist() == [1999, 2000, 2001, 2002, 2003]
