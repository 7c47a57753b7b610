"""A param group with `"clipped": False`: not in the norm and not clipped, but skipped as all."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from cases import CLASSES, assert_same_bits, make_params, set_grads, snapshot, tensors_of
from limited import LIMITS, SCALES, UNITS

import fusedopt
from fusedopt.core import backends
from fusedopt.reference import Control

SHAPES = [(3,), (16385,), (0,), (2, 33, 41), (), (40000,)]


def groups_of(params):
    """The parameters with an even place, and the others in a group that is not clipped."""
    return [{"params": params[::2]}, {"params": params[1::2], "clipped": False}]


def set_spikes(params, step, scale=1.0):
    """Gradients that change from step to step; those of one group grow when the others' don't."""
    set_grads(params, step, SCALES[step % len(SCALES)] * scale)
    for param in params[1::2]:
        param.grad.mul_(1.0 + step)


@pytest.mark.racecheck
@pytest.mark.parametrize("limit", [None, 20.0, *LIMITS], ids=str)
def test_bits_of_the_reference(backend, limit):
    found = []
    for name in ("compiled", "reference"):
        params = make_params(UNITS)
        options = {"max_grad_norm": limit, "telemetry": len(SCALES)}
        if name == "compiled":
            opt = backend.make(fusedopt.FusedAdamW, groups_of(params), **options)
        else:
            opt = fusedopt.FusedAdamW(groups_of(params), backend="reference", **options)
        readings = []
        for step in range(len(SCALES)):
            set_spikes(params, step)
            opt.param_groups[1]["clipped"] = step in (4, 9)
            opt.step()
            readings.append(opt._readings().clone())
        found.append({**tensors_of(opt), **opt.telemetry().columns()})
        found[-1]["readings"] = torch.stack(readings)
        if opt._own["clip_state"] is not None:
            found[-1]["learned"] = opt._own["clip_state"]
    assert_same_bits(*found)


ADAMW = next(case for case in CLASSES if case.cls is fusedopt.FusedAdamW)
SCALED = itertools.product([ADAMW], [None, 1024.0, 3e38], LIMITS[2:5])


@pytest.mark.parametrize(
    ("case", "grad_scale", "limit"),
    [*((case, 1024.0, 20.0) for case in CLASSES), (ADAMW, 3e38, 20.0), *SCALED],
    ids=str,
)
def test_it_is_two_optimizers(backend, case, grad_scale, limit):
    """One that clips, and one without a limit. 1 / 3e38 is too small for a normal float32."""
    params, alone = make_params(SHAPES), make_params(SHAPES)
    opt = backend.make(case.cls, groups_of(params), max_grad_norm=limit, **case.kwargs)
    clips = backend.make(case.cls, alone[::2], max_grad_norm=limit, **case.kwargs)
    free = backend.make(case.cls, alone[1::2], nonfinite="propagate", **case.kwargs)
    for step in range(3):
        for its in (params, alone):
            set_spikes(its, step, min(grad_scale or 1.0, 1e36))
        for it in (opt, clips, free):
            it.grad_scale = None if grad_scale is None else torch.tensor(grad_scale)
            it.step()
        assert_same_bits({"": opt._readings()}, {"": clips._readings()})
    for ours, theirs in zip(params, alone, strict=True):
        assert_same_bits({"": ours.detach()}, {"": theirs.detach()})
    assert 0 < opt._readings()[Control.CLIP_COEF] <= 1


@pytest.mark.parametrize("mode", [None, "propagate"])
def test_the_norm_is_that_of_the_clipped_groups(backend, mode):
    """Also where nothing measures before the update."""
    params = make_params(SHAPES)
    set_grads(params, 1)
    params[1].grad.fill_(1e30)  # finite; the squares overflow in float32, and are measured again
    opt = backend.make(fusedopt.FusedSGD, groups_of(params), nonfinite=mode)
    opt.step()
    expected = math.sqrt(sum(p.grad.double().square().sum().item() for p in params[::2]))
    assert opt.grad_norm.item() == pytest.approx(expected, rel=1e-6)
    assert not opt.step_skipped


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_inf_and_nan_skip_the_whole_step(backend, value):
    params = make_params(SHAPES)
    opt = backend.make(
        fusedopt.FusedAdamW, groups_of(params), max_grad_norm=1.0, telemetry=2, lr=0.1
    )
    set_grads(params, 0)
    opt.step()
    before = snapshot(opt)
    params[1].grad[16384] = value
    opt.step()
    assert opt.step_skipped
    assert not opt.grad_norm.isfinite()
    assert_same_bits(tensors_of(opt), before)
    assert "parameter 0 of param group 1, 1 " in opt.explain()
    opt.nonfinite = "raise"
    with pytest.raises(fusedopt.NonFiniteGradientError, match="parameter 0 of param group 1"):
        opt.step()
    assert_same_bits(tensors_of(opt), before)


def test_only_unclipped_groups(backend):
    params = make_params(SHAPES)
    set_grads(params, 0)
    opt = backend.make(
        fusedopt.FusedAdamW, [{"params": params, "clipped": False}], max_grad_norm=1e-3
    )
    opt.step()
    readings = opt._readings().tolist()
    assert readings[Control.GRAD_NORM] == 0
    assert readings[Control.CLIP_COEF] == 1


@pytest.mark.parametrize("kernels", [None, "reference"])
def test_step_together(kernels):
    """The norm of several optimizers is that of all their clipped groups."""
    params = make_params(SHAPES)
    set_grads(params, 3)
    first = fusedopt.FusedAdamW(groups_of(params[:4]), max_grad_norm=1.0, backend=kernels)
    second = fusedopt.FusedSGD(params[4:], max_grad_norm=1.0, lr=1.0, backend=kernels)
    before = [p.detach().clone() for p in params]
    for unclipped in (True, False):  # the second time, all are clipped
        first.param_groups[1]["clipped"] = not unclipped
        counted = [p for i, p in enumerate(params) if not (unclipped and i in (1, 3))]
        fusedopt.step_together([first, second])
        norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in counted))
        for it in (first, second):
            assert it.grad_norm.item() == pytest.approx(norm, rel=1e-6)
        for old, param in zip(before[4:], params[4:], strict=True):
            torch.testing.assert_close(param, old - param.grad / (norm + 1e-6))
            old.copy_(param.detach())


@pytest.mark.filterwarnings("ignore:fusedopt runs on torch's own functions")
@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_without_kernels(monkeypatch, max_grad_norm):
    params, expected = make_params(SHAPES), make_params(SHAPES)
    reference = fusedopt.FusedSGD(
        groups_of(expected), max_grad_norm=max_grad_norm, backend="reference"
    )
    monkeypatch.setattr(backends, "_C", None)
    monkeypatch.setattr(backends, "found", backends.found._replace(reason="of a test"))
    monkeypatch.setattr(backends, "_warned", set())
    opt = fusedopt.FusedSGD(groups_of(params), max_grad_norm=max_grad_norm)
    for step in range(4):
        for its in (params, expected):
            set_grads(its, step)
        if step == 2 and max_grad_norm is not None:
            params[1].grad[0] = expected[1].grad[0] = math.nan
        opt.param_groups[1]["clipped"] = reference.param_groups[1]["clipped"] = step == 3
        opt.step()
        reference.step()
        found, readings = opt._readings(), reference._readings()
        torch.testing.assert_close(found, readings, rtol=1e-6, atol=0, equal_nan=True)
    torch.testing.assert_close(params, expected)


WRONG = [None, 0, 1, "no", torch.tensor(False)]


@pytest.mark.parametrize("key", ["clipped", "counted"])
@pytest.mark.parametrize("value", WRONG, ids=repr)
def test_other_values_are_refused_by_name(backend, key, value):
    params = make_params([(3,), (4,)])
    match = f"param group 1's {key} is .*; expected True or False"
    groups = [{"params": params[:1]}, {"params": params[1:], key: value}]
    with pytest.raises(TypeError, match=match):
        backend.make(fusedopt.FusedAdamW, groups)
    opt = backend.make(fusedopt.FusedAdamW, params[:1])
    with pytest.raises(TypeError, match=match):
        opt.add_param_group(groups[1])
    assert len(opt.param_groups) == 1
    opt.add_param_group({"params": params[1:], key: False})
    set_grads(params, 0)
    opt.step()
    before = snapshot(opt)
    if key == "clipped":
        opt.param_groups[1][key] = value
        with pytest.raises(TypeError, match=match):
            opt.step()
        assert_same_bits(tensors_of(opt), before)


def test_a_checkpoint_does_not_change_it(backend):
    """As the other settings, it belongs to the program: a checkpoint of torch's has none."""
    params = make_params(SHAPES)
    opt = backend.make(fusedopt.FusedAdamW, groups_of(params))
    set_grads(params, 0)
    opt.step()
    assert "clipped: False" in repr(opt)
    groups = groups_of(params)
    del groups[1]["clipped"]
    torchs = torch.optim.AdamW(groups)
    torchs.load_state_dict(opt.state_dict())
    fresh = torch.optim.AdamW([{"params": params[::2]}, {"params": params[1::2]}])
    fresh.step()
    opt.load_state_dict(fresh.state_dict())
    assert opt.param_groups[1]["clipped"] is False
    other = backend.make(fusedopt.FusedAdamW, groups)
    other.load_state_dict(opt.state_dict())
    assert "clipped" not in other.param_groups[1]


def test_explain_speaks_of_the_clipped_groups(backend):
    params = make_params([(3,), (4,), (5,)])
    set_grads(params, 0)
    params[1].grad.mul_(1000)
    opt = backend.make(fusedopt.FusedAdamW, groups_of(params), max_grad_norm=1.0, telemetry=1)
    opt.step()
    assert "param group 0's" in opt.explain()
    clipped = [it.clipped for it in opt.telemetry().params.values()]
    assert clipped == [True, True, False]
