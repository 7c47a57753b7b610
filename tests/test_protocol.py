"""torch's protocol around a step: closures, hooks, autograd, memory."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from cases import CLASSES, make_params, set_grads
from torch.nn import Parameter
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import fusedopt

SHAPES = [(33,), (4, 5), (16385,)]


def train(optimizer, seeds):
    for seed in seeds:
        set_grads([p for group in optimizer.param_groups for p in group["params"]], seed)
        optimizer.step()


@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_closure_runs_with_gradients_and_its_loss_is_returned(backend, case):
    param = Parameter(torch.ones(3, device=backend.device))
    optimizer = backend.make(case.cls, [param])
    calls = []

    def closure():
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        calls.append(torch.is_grad_enabled())
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert calls == [True] and loss.item() == 3.0 and loss.requires_grad
    assert (param < 1).all() and param.requires_grad and param.is_leaf
    assert optimizer.step() is None


@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_hooks_run_around_the_step_as_around_torchs(case):
    def calls_of(cls):
        param = Parameter(torch.ones(3))
        optimizer = cls([param], lr=0.1)
        param.grad = torch.ones_like(param)
        calls = []

        def hook(name):
            def record(o, args, kwargs):
                moved = param[0].item() < 1
                calls.append((name, o is optimizer, args == (optimizer,), [*kwargs], moved))

            return record

        def replace(o, args, kwargs):
            return (optimizer, lambda: 5.0), {}

        handles = [
            optimizer.register_step_post_hook(hook("post")),
            register_optimizer_step_post_hook(hook("global post")),
            optimizer.register_step_pre_hook(hook("pre")),
            register_optimizer_step_pre_hook(hook("global pre")),
        ]
        try:
            optimizer.step()
            assert optimizer.step(closure=lambda: 1.0) == 1.0
            handles.append(optimizer.register_step_pre_hook(replace))
            assert optimizer.step() == 5.0
        finally:
            for handle in handles:
                handle.remove()
        optimizer.step()
        return calls

    calls = calls_of(case.cls)
    assert calls == calls_of(case.twin)
    assert [name for name, *_ in calls] == ["global pre", "pre", "post", "global post"] * 3
    assert [moved for *_, moved in calls[:4]] == [False, False, True, True]


@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_profiler_sees_one_step_under_its_name(backend, case):
    optimizer = backend.make(case.cls, make_params([(3,)], device=backend.device))
    with torch.profiler.profile(acc_events=True) as profile:  # else some versions warn
        train(optimizer, [0])
    # What a GPU does in that time is an event of the same name.
    events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CPU]
    names = [e.name for e in events if e.name.startswith("Optimizer.step")]
    assert names == [f"Optimizer.step#{case.cls.__name__}.step"]


@pytest.mark.parametrize("backend_name", [None, "reference"])
def test_default_device_that_is_not_the_parameters(backend_name):
    params = make_params(SHAPES)
    optimizer = fusedopt.FusedAdam(params, backend=backend_name, max_grad_norm=1.0)
    set_grads(params, 0)
    with torch.device("meta"):
        optimizer.step()
        optimizer.step()
        assert optimizer.grad_norm > 0
    assert all(optimizer.state[p]["step"] == 2 for p in params)


def test_zero_grad(backend):
    params = make_params(SHAPES, device=backend.device)
    optimizer = backend.make(fusedopt.FusedAdam, params)
    train(optimizer, [0])
    optimizer.zero_grad(set_to_none=False)
    assert all((p.grad == 0).all() for p in params)
    optimizer.step()
    assert optimizer.grad_norm == 0
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)


@pytest.mark.parametrize("gaps", [False, True])
def test_autograd_notices_a_step_between_forward_and_backward(backend, gaps):
    whole = torch.ones(3, 4, device=backend.device)
    param = (whole[:, ::2] if gaps else whole).detach().requires_grad_()
    optimizer = backend.make(fusedopt.FusedAdam, [param])
    for _ in range(2):
        loss = (param * param).sum()
        param.grad = torch.ones_like(param)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("gaps", [False, True])
def test_step_leaves_alone_what_has_no_gradient(backend, gaps):
    """An autograd graph with a parameter that the step doesn't change stays valid."""
    whole = torch.ones(3, 4, device=backend.device)
    param = (whole[:, ::2] if gaps else whole).detach().requires_grad_()
    other = Parameter(torch.ones(3, device=backend.device))
    optimizer = backend.make(fusedopt.FusedAdam, [param, other])
    for _ in range(2):
        loss = (param * param).sum()
        param.grad = None
        other.grad = torch.ones_like(other)
        optimizer.step()
        loss.backward()
        assert (param.grad == 2).all()


def test_optimizer_in_a_cycle_is_collected(backend):
    """Not by way of a post-accumulate hook: torch's own optimizers leak there, too."""

    def train_in_a_cycle():
        param = Parameter(torch.ones(3, device=backend.device))
        optimizer = backend.make(fusedopt.FusedAdam, [param], max_grad_norm=1.0)
        param.register_hook(lambda _: optimizer.zero_grad())
        param.optimizer = optimizer
        param.sum().backward()
        optimizer.step()
        assert optimizer.grad_norm > 0
        return weakref.ref(optimizer), weakref.ref(param)

    seen = train_in_a_cycle()
    gc.collect()
    assert [ref() for ref in seen] == [None, None]


def test_parameters_and_states_are_freed_with_the_optimizer(backend):
    params = make_params([(5,), (4, 6)], device=backend.device)
    params[1].data = params[1].data[:, ::2]
    optimizer = backend.make(fusedopt.FusedAdam, params)
    train(optimizer, range(2))
    seen = [
        weakref.ref(value) for p in params for value in (p, p.grad, *optimizer.state[p].values())
    ]
    del optimizer, params
    gc.collect()
    assert not any(ref() is not None for ref in seen)


def test_gradients_are_freed_when_set_to_none(backend):
    params = make_params([(5,), (6, 4)], device=backend.device)
    optimizer = backend.make(fusedopt.FusedAdam, params)
    for p in params:
        p.grad = torch.ones(p.shape[::-1], device=backend.device).permute(*reversed(range(p.dim())))
    optimizer.step()
    seen = [weakref.ref(p.grad) for p in params]
    optimizer.zero_grad()
    assert [ref() for ref in seen] == [None, None]


def test_two_hundred_steps_leave_no_tensors_behind(backend):
    params = make_params([(5,), (6, 4)], device=backend.device)
    optimizer = backend.make(fusedopt.FusedAdam, params, max_grad_norm=1.0)

    def count():
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    for step in range(200):
        set_grads(params, step)
        params[0].grad = params[0].grad.new_ones(()).expand(5)
        if step % 3 == 0:  # a new plan
            params[1].data = params[1].data.clone()
        optimizer.step()
        if step == 10:
            before = count()
    assert count() <= before


def test_wrapper_of_a_derived_class_reads_and_sets_the_optimizer_it_wraps(backend):
    """Lightning and Fabric wrap optimizers like this: `self` isn't our object in our properties."""

    class Wrapper:
        def __init__(self, optimizer):
            self.optimizer = optimizer
            self.__class__ = type("Wrapper", (Wrapper, type(optimizer)), {})

        def __getattr__(self, name):
            return getattr(self.optimizer, name)

    params = make_params(SHAPES, device=backend.device)
    optimizer = backend.make(fusedopt.FusedAdam, params)
    wrapper = Wrapper(optimizer)
    assert wrapper.grad_norm == 0 and wrapper.skipped_steps == 0  # no step yet
    wrapper.max_grad_norm, wrapper.nonfinite = 0.5, "skip"
    assert optimizer.max_grad_norm == 0.5 and optimizer.nonfinite == "skip"
    train(optimizer, [0])
    assert wrapper.grad_norm == optimizer.grad_norm > 0
    set_grads(params, 1, scale=float("nan"))
    optimizer.step()
    assert wrapper.step_skipped and wrapper.skipped_steps == 1
    params[0].data = torch.randn(4, 6, device=backend.device).t()
    with pytest.raises(ValueError, match="contiguous in memory"):
        wrapper.max_grad_norm = fusedopt.clip.Unit()
    assert optimizer.max_grad_norm == 0.5
