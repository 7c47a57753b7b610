"""Settings on the wrapper that a trainer puts around an optimizer reach the optimizer."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from cases import CLASSES, assert_same_bits, make_params, set_grads, snapshot, tensors_of

import fusedopt

SHAPES = [(33,), (4, 5)]


class Delegating:
    """As Lightning's and Fabric's: of a derived class, and what it lacks is the optimizer's."""

    def __init__(self, optimizer):
        self._optimizer = optimizer
        self.__class__ = type("Wrapped", (Delegating, type(optimizer)), {})

    def __getattr__(self, name):
        return getattr(self._optimizer, name)


class WithItsOwnStep(Delegating):
    def __init__(self, optimizer):
        self._optimizer = optimizer
        self.__class__ = type("Wrapped", (WithItsOwnStep, type(optimizer)), {})

    def step(self, closure=None):
        return self._optimizer.step(closure)


class Copying:
    """As Fabric's older one: what the optimizer had at that time is copied."""

    def __init__(self, optimizer):
        self.__dict__ = dict(optimizer.__dict__)
        self.__class__ = type("Wrapped", (Copying, type(optimizer)), {})


def derived(optimizer):
    """Of a class that is written down, without its constructor."""

    class Wrapper(type(optimizer)):
        def __init__(self, wrapped):
            self.wrapped = wrapped

        def __getattr__(self, name):
            return getattr(self.wrapped, name)

    return Wrapper(optimizer)


def fabrics(optimizer):
    pytest.importorskip("lightning.fabric")
    from lightning.fabric import Fabric

    return Fabric(accelerator="cpu").setup_optimizers(optimizer)


def lightnings(optimizer):
    pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.core.optimizer import LightningOptimizer

    class Strategy:
        def optimizer_step(self, optimizer, closure, **kwargs):
            return optimizer.step(closure)

    wrapper = LightningOptimizer(optimizer)
    wrapper._strategy = Strategy()
    return wrapper


WRAPPERS = [Delegating, WithItsOwnStep, Copying, derived, fabrics, lightnings]
wrapped = pytest.mark.parametrize("wrap", WRAPPERS, ids=lambda wrap: wrap.__name__)


def make(wrap, make_optimizer=fusedopt.FusedAdam, **kwargs):
    params = make_params(SHAPES)
    optimizer = make_optimizer(params, **kwargs)
    return params, optimizer, wrap(optimizer)


@wrapped
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("scaler_class", [fusedopt.GradScaler, torch.amp.GradScaler])
@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_scaler_steps_a_wrapper(case, scaler_class, unscale, wrap):
    params, optimizer, wrapper = make(wrap, case.cls, lr=0.1, **case.kwargs)
    twins = make_params(SHAPES)
    twin = case.cls(twins, lr=0.1, nonfinite="skip", **case.kwargs)
    scaler = scaler_class("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    for seed, planted in enumerate([None, math.inf, None, math.nan]):
        set_grads(params, seed, scale=scaler.get_scale())
        set_grads(twins, seed)
        if planted is not None:
            params[0].grad[3] = twins[0].grad[3] = planted
        before = scaler.get_scale()
        if unscale:
            scaler.unscale_(wrapper)
        scaler.step(wrapper)
        scaler.update()
        twin.step()
        assert_same_bits(tensors_of(optimizer), tensors_of(twin))
        assert scaler.get_scale() == (before if planted is None else before / 2)


@wrapped
def test_what_is_set_on_a_wrapper_is_set_on_the_optimizer(wrap):
    params, optimizer, wrapper = make(wrap)
    set_grads(params, 0)
    optimizer.step()
    values = {
        "grad_scale": torch.tensor(4.0),
        "found_inf": torch.tensor(1.0),
        "skips_for_scaler": True,
        "max_grad_norm": 0.5,
        "nonfinite": "raise",
        "max_consecutive_skips": 3,
        "param_groups": [dict(group) for group in optimizer.param_groups],
        "state": {},
        "defaults": dict(optimizer.defaults),
    }
    for name, value in values.items():
        setattr(wrapper, name, value)
        assert getattr(optimizer, name) is value or getattr(optimizer, name) == value, name
    before = snapshot(optimizer)
    optimizer.step()
    assert optimizer.step_skipped  # for its found_inf
    for name in ("grad_scale", "found_inf", "skips_for_scaler"):
        delattr(wrapper, name)
        assert not getattr(optimizer, name)
    assert_same_bits(tensors_of(optimizer), before)
    optimizer.step()
    assert not optimizer.step_skipped


@wrapped
def test_hooks_of_a_wrapper_are_called(wrap):
    params, optimizer, wrapper = make(wrap)
    calls = []
    wrapper.register_step_pre_hook(lambda *_: calls.append("pre"))
    wrapper.register_step_post_hook(lambda *_: calls.append("post"))
    wrapper.register_state_dict_post_hook(lambda *_: calls.append("saved"))
    wrapper.register_load_state_dict_pre_hook(lambda *_: calls.append("loads"))
    wrapper.register_load_state_dict_post_hook(lambda *_: calls.append("loaded"))
    set_grads(params, 0)
    for _ in range(2):
        calls.clear()
        optimizer.step()
        wrapper.load_state_dict(optimizer.state_dict())
        wrapper.register_step_post_hook(lambda *_: calls.append("later"))
    assert calls == ["pre", "post", "later", "saved", "loads", "loaded"]
    optimizer.step()
    assert calls[6:] == ["pre", "post", "later", "later"]


@wrapped
def test_wrapper_and_optimizer_step_load_and_grow_in_turn(wrap):
    limit = fusedopt.clip.ZScore(warmup=2)
    params, optimizer, wrapper = make(wrap, lr=0.1, max_grad_norm=limit)
    twins = make_params(SHAPES)
    twin = fusedopt.FusedAdam(twins, lr=0.1, max_grad_norm=limit)
    steppers = [(optimizer, twin), (wrapper, twin)]

    def steps():
        for seed, (one, its_twin) in enumerate(steppers * 2):
            for these in (params, twins):
                set_grads(these, seed)
            one.step()
            its_twin.step()
            assert_same_bits(tensors_of(optimizer), tensors_of(twin))
            assert wrapper.grad_norm == optimizer.grad_norm == twin.grad_norm

    steps()
    for loaded in (optimizer, wrapper):
        loaded.load_state_dict(loaded.state_dict())
        steps()
        for one, its in ((loaded, params), (twin, twins)):
            its += make_params([(7,)])
            one.add_param_group({"params": its[-1:], "lr": 0.02})
        steps()


@wrapped
def test_schedulers_on_a_wrapper_reach_the_optimizer_after_a_load(wrap):
    params, optimizer, wrapper = make(wrap, lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(wrapper, 1, 0.5)
    optimizer.load_state_dict(optimizer.state_dict())
    set_grads(params, 0)
    wrapper.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_copies_share_nothing_with_what_they_were_made_of():
    params, optimizer, _ = make(Delegating, max_grad_norm=1.0)
    set_grads(params, 0)
    optimizer.step()
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        other.max_grad_norm = 2.0
        other.load_state_dict(other.state_dict())
        assert optimizer.max_grad_norm == 1.0
        kept = snapshot(optimizer)
        set_grads([p for group in other.param_groups for p in group["params"]], 1)
        other.step()
        assert_same_bits(tensors_of(optimizer), kept)


def test_accelerates_wrapper_with_a_scaler():
    accelerate = pytest.importorskip("accelerate")
    from accelerate.optimizer import AcceleratedOptimizer

    accelerate.Accelerator(cpu=True)
    for scaler_class in (fusedopt.GradScaler, torch.amp.GradScaler):
        scaler = scaler_class("cpu", init_scale=1024.0)
        scaler.scale(torch.ones(()))
        params = make_params(SHAPES)
        optimizer = fusedopt.FusedSGD(params, lr=0.1)
        wrapper = AcceleratedOptimizer(optimizer, device_placement=False, scaler=scaler)
        before = params[0].detach().clone()
        params[0].grad = torch.full_like(params[0], 1024.0)
        wrapper.step()
        torch.testing.assert_close(params[0].detach(), before - 0.1)
        params[0].grad[0] = math.inf
        wrapper.step()
        torch.testing.assert_close(params[0].detach(), before - 0.1)
        assert scaler.get_scale() == 512


def test_accelerates_schedule_waits_for_a_skip_that_it_is_told_of():
    """The hook of docs/migrating.md."""
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    params = make_params(SHAPES)
    fused = fusedopt.FusedSGD(params, lr=1.0, max_grad_norm=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(fused, 1, 0.5)
    opt, schedule = accelerator.prepare(fused, schedule)

    def tell(optimizer, args, kwargs):
        opt._is_overflow = bool(optimizer.step_skipped)

    fused.register_step_post_hook(tell)
    rates = []
    for scale in (1.0, math.inf, math.nan, 1.0):
        set_grads(params, 0, scale)
        opt.step()
        schedule.step()
        rates.append(fused.param_groups[0]["lr"])
    assert rates == [0.5, 0.5, 0.5, 0.25]


@wrapped
def test_closure_of_a_wrapper_returns_its_tensor(wrap):
    _, optimizer, wrapper = make(wrap)
    loss = torch.ones(())
    assert wrapper.step(lambda: loss) is loss and optimizer.step(lambda: 2.0) == 2.0
