"""Adaptive limits: the formulas by hand, equal bits on all backends, refusals."""

from __future__ import annotations

import math
import statistics
import threading

import numpy as np
import pytest
import torch
from cases import CLASSES, DTYPES, assert_same_bits, make_params, set_grads, snapshot, tensors_of
from limited import LIMITS, OWN, SCALES, UNITS, run

import fusedopt
from fusedopt.clip import AdaptiveClip, Percentile, PerTensor, Unit, ZScore


@pytest.mark.racecheck
@pytest.mark.parametrize("limit", LIMITS, ids=str)
@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_bits_of_the_reference(backend, case, limit):
    params = make_params(device=backend.device)
    twins = [p.detach().clone().requires_grad_() for p in params]
    ours = backend.make(case.cls, params, **case.kwargs, max_grad_norm=limit)
    reference = case.cls(twins, backend="reference", **case.kwargs, max_grad_norm=limit)
    np.testing.assert_array_equal(run(ours, params), run(reference, twins))
    assert_same_bits(tensors_of(ours), tensors_of(reference))
    assert_same_bits({"state": ours._own["clip_state"]}, {"state": reference._own["clip_state"]})
    assert ours.skipped_steps == 1


def test_percentile_by_hand(backend):
    limit = Percentile(80, window=5, warmup=3)
    params = make_params(device=backend.device)
    optimizer = backend.make(fusedopt.FusedAdam, params, max_grad_norm=limit)
    norms, coefs = run(optimizer, params)
    seen: list[float] = []
    for norm, coef in zip(norms, coefs):
        if not math.isfinite(norm):
            continue
        largest = np.percentile(seen[-5:], 80) if len(seen) >= 3 else math.inf
        assert coef == pytest.approx(min(1.0, largest / (norm + 1e-6)), rel=1e-6)
        seen.append(norm)
    assert min(coefs[:4]) == 1.0 and coefs[4] < 0.05


@pytest.mark.racecheck
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("limit", OWN, ids=str)
def test_bits_of_every_dtype(backend, limit, dtype):
    params = make_params(UNITS, dtype, backend.device)
    params[3].grad = None
    twins = [p.detach().clone().requires_grad_() for p in params]
    ours = backend.make(fusedopt.FusedAdamW, params, max_grad_norm=limit, telemetry=3)
    reference = fusedopt.FusedAdamW(twins, backend="reference", max_grad_norm=limit, telemetry=3)
    scales = [1.0, 1.2, 0.8, 30.0, 0.9]
    np.testing.assert_array_equal(run(ours, params, scales), run(reference, twins, scales))
    assert_same_bits(tensors_of(ours), tensors_of(reference))
    assert_same_bits(ours.telemetry().columns(), reference.telemetry().columns())


@pytest.mark.parametrize("limit", [Percentile, ZScore])
def test_never_above_a_fixed_limit(backend, limit):
    params = make_params(device=backend.device)
    optimizer = backend.make(fusedopt.FusedAdam, params, max_grad_norm=limit(max_norm=100.0))
    norms, coefs = run(optimizer, params, SCALES[:6])
    expected = [min(1.0, 100.0 / (norm + 1e-6)) for norm in norms]
    assert coefs == pytest.approx(expected, rel=1e-6)


def test_z_score_by_hand(backend):
    params = make_params(device=backend.device)
    optimizer = backend.make(fusedopt.FusedAdam, params, max_grad_norm=ZScore(warmup=4))
    norms, coefs = run(optimizer, params)
    warm_up = norms[:4]
    mean, variance = statistics.fmean(warm_up), statistics.pvariance(warm_up)
    for norm, coef in list(zip(norms, coefs))[4:]:
        if not math.isfinite(norm):
            continue
        z = (norm - mean) / (math.sqrt(variance) + 1e-6)
        clipped = mean + 2.5**2 / z * math.sqrt(variance) if z > 2.5 else norm
        assert coef == pytest.approx(min(1.0, clipped / (norm + 1e-6)), rel=1e-5)
        mean = 0.97 * mean + 0.03 * clipped
        variance = 0.97 * variance + 0.03 * (clipped - mean) ** 2
    assert coefs[:4] == [1.0] * 4 and coefs[4] < 0.05


def clipped_grads(limit, params, backend, scales):
    """What SGD with a learning rate of 1 subtracts: the gradients, as clipped; by step."""
    optimizer = backend.make(fusedopt.FusedSGD, params, lr=1.0, max_grad_norm=limit)
    steps = []
    for step, scale in enumerate(scales):
        set_grads(params, step, scale)
        before = [p.detach().double().clone() for p in params]
        optimizer.step()
        steps.append([b - p.detach().double() for b, p in zip(before, params)])
    return steps


def test_per_tensor_by_hand(backend):
    params = make_params([(30, 7), (11,)], torch.float64, backend.device)
    scales = [3.0, 1.0, 2.0, 40.0, 1.0, 0.5, 25.0]
    limit = PerTensor(threshold=1.5, beta=0.9, warmup=3, warmup_norm=2.0)
    steps = clipped_grads(limit, params, backend, scales)
    averages = [math.inf, math.inf]
    for step, scale in enumerate(scales):
        set_grads(params, step, scale)
        norms = [p.grad.norm().item() for p in params]
        coefs = [min(1.0, 1.5 * a / n) for a, n in zip(averages, norms)]
        if step < 3:
            coefs = [min(1.0, 2.0 / (math.hypot(*norms) + 1e-6))] * 2
        for i, param in enumerate(params):
            torch.testing.assert_close(steps[step][i], param.grad * coefs[i])
            clipped = coefs[i] * norms[i]
            if step < 3:
                averages[i] = min(averages[i], clipped)
            else:
                averages[i] = 0.9 * averages[i] + 0.1 * clipped
    assert coefs[0] < 1 and coefs[1] < 1


def test_unit_by_hand(backend):
    params = make_params([(30, 7), (11,), (4, 3, 3, 3), ()], torch.float64, backend.device)
    with torch.no_grad():
        params[0][3] = 0  # rows of zeros may grow, by eps
    before = [p.detach().clone() for p in params]
    (step,) = clipped_grads(Unit(0.3, eps=0.01), params, backend, [1.0])
    for weights, param, clipped in zip(before, params, step):
        rows = (lambda x: x.flatten(1)) if param.dim() > 1 else (lambda x: x.reshape(1, -1))
        limits = 0.3 * rows(weights).norm(dim=1).clamp(min=0.01)
        coefs = (limits / rows(param.grad).norm(dim=1)).clamp(max=1.0)
        torch.testing.assert_close(rows(clipped), rows(param.grad) * coefs[:, None])
    assert 0 < step[0][3].norm() <= 0.003001


@pytest.mark.parametrize("limit", [PerTensor(warmup=1), Unit(0.1)], ids=str)
def test_the_reading_is_the_smallest_coefficient(backend, limit):
    params = make_params([(30, 7), (11,), (9, 4)], torch.float64, backend.device)
    optimizer = backend.make(fusedopt.FusedSGD, params, lr=0.0, max_grad_norm=limit, telemetry=9)
    for step, scale in enumerate((1.0, 5.0)):
        set_grads(params, step, scale)
        optimizer.step()
    probe = backend.make(fusedopt.FusedSGD, params, lr=1.0, max_grad_norm=limit)
    probe.load_state_dict(optimizer.state_dict())
    before = [p.detach().clone() for p in params]
    set_grads(params, 2, 50.0)
    for it in (optimizer, probe):
        it.param_groups[0]["lr"] = 0.0 if it is optimizer else 1.0
        it.step()
    coefs = [((b - p.detach()) / p.grad).min().item() for b, p in zip(before, params)]
    assert optimizer.telemetry().clip_coef[-1].item() == pytest.approx(min(coefs), rel=1e-9)
    assert min(coefs) < 0.5
    assert f"the most clipped {limit.part} by {min(coefs):.3g}" in optimizer.explain()
    assert f"the most clipped {limit.part} by " in probe.explain()


def test_rows_that_are_not_contiguous_are_refused(backend):
    transposed = torch.nn.Parameter(torch.randn(4, 6, device=backend.device).t())
    words = r"parameter 0 of param group 0 has shape \(6, 4\) and strides \(1, 6\); Unit"
    with pytest.raises(ValueError, match=words):
        backend.make(fusedopt.FusedAdam, [transposed], max_grad_norm=Unit())
    optimizer = backend.make(fusedopt.FusedAdam, [transposed], max_grad_norm=1.0)
    with pytest.raises(ValueError, match=words):
        optimizer.max_grad_norm = Unit()
    assert optimizer.max_grad_norm == 1.0
    images = torch.nn.Parameter(torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last))
    backend.make(fusedopt.FusedAdam, [images.to(backend.device)], max_grad_norm=Unit())


def test_rows_of_other_layouts(backend):
    shapes = [(4, 3, 5, 5), (6, 8)]
    results = []
    for layout in ("contiguous", "otherwise"):
        params = make_params(shapes, device=backend.device)
        if layout == "otherwise":  # channels last, and with gaps between the rows
            params[0] = torch.nn.Parameter(params[0].to(memory_format=torch.channels_last))
            wide = torch.zeros(6, 11, device=backend.device)
            wide[:, :8] = params[1].detach()
            params[1] = torch.nn.Parameter(wide[:, :8])
        optimizer = backend.make(fusedopt.FusedSGD, params, lr=0.1, max_grad_norm=Unit(0.05))
        run(optimizer, params, [1.0, 2.0])
        results.append([p.detach().contiguous() for p in params])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


class Halved(ZScore):
    """The kernels wouldn't know what it overrides."""

    def limit(self, state, norm):
        return super().limit(state, norm) / 2


@pytest.mark.parametrize("value", [PerTensor, AdaptiveClip(), AdaptiveClip, Halved()])
def test_what_is_no_limit_is_refused(value):
    with pytest.raises(TypeError, match=r"max_grad_norm is .*; expected .*fusedopt\.clip's limits"):
        fusedopt.FusedAdam(make_params(), max_grad_norm=value)


def test_a_limit_is_not_changed_in_the_middle_of_another_threads_step(monkeypatch):
    params = make_params([(4, 2)])
    optimizer = fusedopt.FusedAdam(params, max_grad_norm=ZScore())
    known = type(optimizer)._clip_state
    set_later = []

    def meanwhile(self, clip):
        if not set_later:
            other = PerTensor(warmup=2)
            set_later.append(threading.Thread(target=setattr, args=(self, "max_grad_norm", other)))
            set_later[0].start()
            set_later[0].join(0.2)
        return known(self, clip)

    monkeypatch.setattr(type(optimizer), "_clip_state", meanwhile)
    run(optimizer, params, [1.0])
    set_later[0].join()
    assert optimizer._own["clip_state"] is None
    run(optimizer, params, [1.0])
    assert optimizer._own["clip_state"].tolist() == [[1, pytest.approx(1.0, rel=1e-4)]]


@pytest.mark.parametrize("limit", OWN, ids=str)
def test_own_limits_look_at_unscaled_gradients(backend, limit):
    updated = []
    for scale in (1.0, 1024.0):
        params = make_params(UNITS, device=backend.device)
        optimizer = backend.make(fusedopt.FusedAdam, params, max_grad_norm=limit)
        optimizer.grad_scale = torch.tensor(scale, device=backend.device)
        run(optimizer, params, [scale * it for it in (1.0, 1.5, 1.25, 9.0)])
        updated.append(tensors_of(optimizer))
    assert_same_bits(*updated)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Percentile(101), ValueError, "Percentile's percentile is 101; expected from 0"),
        (lambda: Percentile(math.nan), ValueError, "percentile is nan"),
        (lambda: Percentile("95"), TypeError, "Percentile's percentile is a str"),
        (lambda: Percentile(window=0), ValueError, "window is 0; expected from 1 to 4096"),
        (lambda: Percentile(window=2.0), TypeError, "window is a float; expected an int"),
        (lambda: Percentile(window=5, warmup=6), ValueError, "warmup is 6; expected from 1 to 5"),
        (lambda: ZScore(alpha=1.5), ValueError, "ZScore's alpha is 1.5; expected from 0 to 1"),
        (lambda: ZScore(threshold=0), ValueError, "threshold is 0; expected a finite number above"),
        (lambda: ZScore(max_norm=0.0), ValueError, "max_norm is 0.0; expected a finite number"),
        (lambda: ZScore(eps=math.inf), ValueError, "eps is inf"),
        (lambda: ZScore(warmup=True), TypeError, "warmup is a bool"),
        (lambda: PerTensor(threshold=0), ValueError, "threshold is 0; expected a finite number"),
        (lambda: PerTensor(beta=2), ValueError, "beta is 2; expected from 0 to 1"),
        (lambda: PerTensor(warmup=0), ValueError, "warmup is 0; expected from 1"),
        (lambda: PerTensor(warmup_norm=math.inf), ValueError, "warmup_norm is inf"),
        (lambda: Unit(clipping=-1), ValueError, "Unit's clipping is -1; expected a finite number"),
        (lambda: Unit(eps="0"), TypeError, "eps is a str"),
        (lambda: Unit(np.float32("nan")), ValueError, "clipping is nan"),
    ],
)
def test_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_numbers_of_numpy():
    """In the formulas, a float32 of NumPy's would make single precision of Python's numbers."""
    limit = Percentile(np.float32(10.1), window=np.int64(20))
    assert limit == Percentile(float(np.float32(10.1)), window=20)
    assert type(limit.percentile) is float and type(limit.window) is int
    assert repr(Unit(1)) == "Unit(max_norm=inf, clipping=1, eps=0.001)"


def test_no_state_is_made_in_a_graph(backend, monkeypatch):
    params = make_params([(5,), (6,)], device=backend.device)
    optimizer = backend.make(fusedopt.FusedAdam, params, max_grad_norm=1.0)
    set_grads(params[:1], 0)
    optimizer.step()
    set_grads(params, 1)
    before = snapshot(optimizer)
    with monkeypatch.context() as capture:
        capture.setattr(torch.cuda, "is_initialized", lambda: True)
        capture.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(RuntimeError, match="parameter 1 of param group 0 has no state yet"):
            optimizer.step()
        params[1].grad = None
        optimizer.max_grad_norm = ZScore()
        with pytest.raises(RuntimeError, match=r"ZScore\(.*\) has no state yet"):
            optimizer.step()
        assert_same_bits(snapshot(optimizer), before)
        optimizer.max_grad_norm = 1.0
        optimizer.step()
    assert optimizer.state[params[0]]["step"] == 2 and params[1] not in optimizer.state


def test_a_gradient_of_zeros_is_not_clipped(backend):
    """The reading is the coefficient of those that are not zeros, as without it."""
    coefs = []
    for shapes in ([(30,), (5,), (0,)], [(30,)]):
        params = make_params(shapes, device=backend.device)
        optimizer = backend.make(fusedopt.FusedSGD, params, max_grad_norm=PerTensor(warmup=1))
        coefs.append([])
        for step in range(4):
            set_grads(params, step, 2.0**step)
            if len(params) > 1:
                params[1].grad.zero_()
            optimizer.step()
            coefs[-1].append(optimizer._readings()[2].item())
    assert coefs[0] == coefs[1] and max(coefs[0]) < 1


def test_telemetry_of_nothing_but_empty_parameters(backend):
    params = make_params([(0,), (0, 3)], device=backend.device)
    set_grads(params, 0)
    optimizer = backend.make(fusedopt.FusedAdam, params, max_grad_norm=1.0, telemetry=2)
    optimizer.step()
    assert optimizer.telemetry().grad_norm.tolist() == [0.0]
