"""fusedopt.GradScaler against torch's: the same scales, skips and updates, in one step."""

from __future__ import annotations

import math

import pytest
import torch
from cases import CLASSES, assert_same_bits, make_params, set_grads, snapshot, tensors_of

import fusedopt

SHAPES = [(7,), (16385,), (1,)]
ARGUMENTS = {"init_scale": 1024.0, "growth_interval": 2}


class Run:
    """One optimizer with one scaler; its gradients are those of a loss scaled by it."""

    def __init__(self, scaler, make, case, **kwargs):
        self.scaler = scaler
        self.params = make_params(SHAPES, device=scaler._device)
        self.optimizer = make(case.cls, self.params, **case.kwargs, **kwargs)

    def backward(self, seed, planted=None):
        set_grads(self.params, seed)
        scale = self.scaler.scale(torch.ones((), device=self.scaler._device))
        for param in self.params:
            param.grad *= scale
        if planted is not None:
            self.params[1].grad[-1] = planted


def both(backend, case=CLASSES[0], **kwargs):
    return [
        Run(scaler(backend.device, **ARGUMENTS), backend.make, case, **kwargs)
        for scaler in (fusedopt.GradScaler, torch.amp.GradScaler)
    ]


PLANTED = [None, None, math.inf, None, math.nan, -math.inf, None, None, None]


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("kwargs", [{}, {"max_grad_norm": 0.5}, {"nonfinite": "raise"}], ids=str)
@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_as_torchs_scaler(backend, case, kwargs, unscale):
    """Scales are powers of two here, so that unscaling rounds nothing: equal bits."""
    ours, stock = both(backend, case, **kwargs)
    for seed, planted in enumerate(PLANTED):
        for run in (ours, stock):
            run.backward(seed, planted)
            if unscale:
                run.scaler.unscale_(run.optimizer)
            run.scaler.step(run.optimizer)
            run.scaler.update()
        assert ours.scaler.state_dict() == stock.scaler.state_dict()
        assert_same_bits(tensors_of(ours.optimizer), tensors_of(stock.optimizer))
        assert ours.optimizer.step_skipped == (planted is not None)
    assert ours.optimizer.skipped_steps == 3


def test_clipping_by_torch_between_unscale_and_step(backend):
    ours, stock = both(backend)
    for seed, planted in enumerate(PLANTED):
        for run in (ours, stock):
            run.backward(seed, planted)
            run.scaler.unscale_(run.optimizer)
            torch.nn.utils.clip_grad_norm_(run.params, 1.0)
            run.scaler.step(run.optimizer)
            run.scaler.update()
        assert ours.scaler.state_dict() == stock.scaler.state_dict()
        assert_same_bits(tensors_of(ours.optimizer), tensors_of(stock.optimizer))


def test_gradients_stay_as_they_were(backend):
    run, _ = both(backend, max_grad_norm=0.5)
    run.backward(0)
    before = [p.grad.clone() for p in run.params]
    run.scaler.step(run.optimizer)
    assert all(torch.equal(p.grad, grad) for p, grad in zip(run.params, before))


def test_step_reads_the_gradients_once(backend, monkeypatch):
    run, _ = both(backend)

    def refuse(*args):
        raise AssertionError("a pass over the gradients that the step makes by itself")

    monkeypatch.setattr(torch, "_amp_foreach_non_finite_check_and_unscale_", refuse)
    for seed in range(2):
        run.backward(seed)
        run.scaler.step(run.optimizer)
        run.scaler.update()
    assert run.optimizer.skipped_steps == 0


@pytest.mark.parametrize("mode", ["skip", "raise", "propagate", None])
def test_overflow_skips_in_every_mode_without_raising(backend, mode):
    run, _ = both(backend, nonfinite=mode)
    run.backward(0)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    before = snapshot(run.optimizer)
    run.backward(1, math.nan)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    assert_same_bits(tensors_of(run.optimizer), before)
    assert run.scaler.get_scale() == 512 and run.optimizer.skipped_steps == 1
    # Without the scaler, the mode is in force again.
    run.backward(2, math.nan)
    if mode == "raise":
        with pytest.raises(fusedopt.NonFiniteGradientError):
            run.optimizer.step()
    else:
        run.optimizer.step()
        assert run.params[1].isnan().any() == (mode in ("propagate", None))


def test_16_bit_parameters(backend):
    """torch's scaler refuses float16 gradients; here they are unscaled in float32."""
    scaler = fusedopt.GradScaler(backend.device, init_scale=2.0**14)
    params = make_params([(555,)], torch.float16, backend.device)
    twins = make_params([(555,)], torch.float16, backend.device)
    optimizer = backend.make(fusedopt.FusedAdam, params)
    twin = backend.make(fusedopt.FusedAdam, twins)
    params[0].grad = torch.linspace(-6e4, 6e4, 555, device=backend.device).half()
    twin.grad_scale = scaler.scale(torch.ones((), device=backend.device))
    twins[0].grad = params[0].grad.clone()
    scaler.step(optimizer)
    scaler.update()
    twin.step()
    assert_same_bits(tensors_of(optimizer), tensors_of(twin))
    assert scaler.get_scale() == 2.0**14


def test_several_optimizers_of_one_scaler(backend):
    scaler = fusedopt.GradScaler(backend.device, **ARGUMENTS)
    ours = Run(scaler, backend.make, CLASSES[0])
    stock_params = make_params(SHAPES, device=backend.device)
    stock = torch.optim.SGD(stock_params, lr=0.1)
    for planted in (None, math.inf):
        ours.backward(0, planted)
        for param in stock_params:
            param.grad = torch.full_like(param, 1024.0)
        before = [p.detach().clone() for p in stock_params]
        scaler.step(ours.optimizer)
        scaler.step(stock)
        scaler.update()
        for param, value in zip(stock_params, before):
            torch.testing.assert_close(param.detach(), value - 0.1 * param.grad)
    assert scaler.get_scale() == 512


def test_disabled_scaler_does_nothing(backend):
    scaler = fusedopt.GradScaler(backend.device, enabled=False)
    params = make_params(SHAPES, device=backend.device)
    twins = make_params(SHAPES, device=backend.device)
    optimizer = backend.make(fusedopt.FusedAdam, params)
    twin = backend.make(fusedopt.FusedAdam, twins)
    set_grads(params, 0)
    set_grads(twins, 0)
    assert scaler.step(optimizer, lambda: 3.0) == 3.0
    scaler.update()
    twin.step()
    assert_same_bits(tensors_of(optimizer), tensors_of(twin))


def outcome_of(function):
    try:
        function()
    except Exception as error:
        return type(error), str(error)
    return None


def test_refusals_are_torchs(backend):
    def no_gradients(run):
        run.optimizer.zero_grad()
        run.scaler.step(run.optimizer)

    def closure(run):
        run.scaler.step(run.optimizer, closure=lambda: 0.0)

    def twice(run):
        run.scaler.step(run.optimizer)
        run.scaler.step(run.optimizer)

    def unscaled_after_step(run):
        run.scaler.step(run.optimizer)
        run.scaler.unscale_(run.optimizer)

    for misuse in (no_gradients, closure, twice, unscaled_after_step):
        outcomes = []
        for run in both(backend):
            run.backward(0)
            outcomes.append(outcome_of(lambda run=run, misuse=misuse: misuse(run)))
        assert outcomes[0] == outcomes[1] is not None


def test_nothing_of_the_scaler_stays_behind(backend):
    run, _ = both(backend)
    run.backward(0)
    run.params[0].grad = run.params[0].grad.to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        run.scaler.step(run.optimizer)
    assert run.optimizer.grad_scale is None and run.optimizer.found_inf is None
    assert not run.optimizer.skips_for_scaler


def overflow_after_unscale(run, planted):
    run.backward(1)
    run.scaler.unscale_(run.optimizer)
    run.params[1].grad[-1] = planted  # as a clip of one's own, or noise, may do
    run.scaler.step(run.optimizer)


@pytest.mark.parametrize("planted", [math.inf, math.nan])
@pytest.mark.parametrize("mode", ["skip", "raise", "propagate", None])
def test_gradients_that_overflow_after_a_finite_unscale(backend, mode, planted):
    run, _ = both(backend, nonfinite=mode)
    run.backward(0)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    before = snapshot(run.optimizer)
    if mode == "raise":
        with pytest.raises(fusedopt.NonFiniteGradientError, match="parameter 1 of param group 0"):
            overflow_after_unscale(run, planted)
    else:
        overflow_after_unscale(run, planted)
    assert run.optimizer.step_skipped and run.optimizer.skipped_steps == 1
    run.scaler.update()
    assert run.scaler.get_scale() == 512
    assert_same_bits(tensors_of(run.optimizer), before)


@pytest.mark.parametrize("unscale", [False, True])
def test_scale_falls_when_skips_end_in_an_error(backend, unscale):
    run, _ = both(backend, max_consecutive_skips=2)
    for step in range(4):
        run.backward(0, math.inf)
        if unscale:
            run.scaler.unscale_(run.optimizer)
        if step == 0:
            run.scaler.step(run.optimizer)
        else:
            if backend.device == "cuda":
                torch.cuda.synchronize()
            with pytest.raises(fusedopt.TooManySkipsError):
                run.scaler.step(run.optimizer)
        run.scaler.update()
    assert run.scaler.get_scale() == 64
    run.backward(0)
    run.scaler.step(run.optimizer)
    assert not run.optimizer.step_skipped


def test_what_was_set_by_hand_is_there_after_the_scalers_step(backend):
    run, _ = both(backend)
    run.optimizer.found_inf = found = torch.zeros((), device=backend.device)
    run.optimizer.grad_scale = scale = torch.ones((), device=backend.device)
    run.backward(0)
    run.scaler.step(run.optimizer)
    assert run.optimizer.found_inf is found and run.optimizer.grad_scale is scale


@pytest.mark.parametrize("name", ["grad_scale", "found_inf"])
@pytest.mark.parametrize(
    ("value", "told"),
    [
        (1024.0, "is a float; expected a tensor of one real number"),
        (torch.ones(2), r"has the shape \(2,\)"),
        (torch.tensor(1j), "is torch.complex64"),
        (torch.ones((), device="meta"), "is on the meta device"),
    ],
    ids=["float", "two", "complex", "meta"],
)
def test_what_is_no_tensor_of_one_number_is_refused_by_name(name, value, told):
    optimizer = fusedopt.FusedAdam(make_params([(3,)]), max_grad_norm=1.0)
    with pytest.raises((TypeError, ValueError), match=f"^{name} {told}"):
        setattr(optimizer, name, value)
    assert getattr(optimizer, name) is None
