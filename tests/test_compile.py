"""torch.compile around a step or a clip: the graph breaks there, once; nothing inside is traced."""

from __future__ import annotations

import pytest
import torch
from cases import CLASSES, assert_same_bits, tensors_of
from torch._dynamo.utils import counters

import fusedopt


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def model_and_optimizer(cls, **kwargs):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))
    return model, cls(model.parameters(), **kwargs)


def trained(cls, compile_model=lambda f: f, compile_step=lambda f: f, steps=4):
    model, optimizer = model_and_optimizer(cls, max_grad_norm=0.5)
    forward = compile_model(model)

    @compile_step
    def train(x):
        optimizer.zero_grad()
        forward(x).square().sum().backward()
        optimizer.step()
        return optimizer.grad_norm

    generator = torch.Generator().manual_seed(1)
    norms = torch.stack([train(torch.randn(3, 4, generator=generator)) for _ in range(steps)])
    return {**tensors_of(optimizer), "norms": norms}


def compiled(f):
    return torch.compile(f, backend="aot_eager")


@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_compiled_model_with_a_step_outside(case):
    assert_same_bits(trained(case.cls, compile_model=compiled), trained(case.cls))


@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_compiled_training_step(case):
    actual = trained(case.cls, compile_step=compiled)
    broken_at = [reason for reason in counters["graph_break"] if "fusedopt" in reason.lower()]
    assert len(broken_at) == 1 and "FusedOptimizer._locked_step" in broken_at[0]
    assert_same_bits(actual, trained(case.cls))


def test_step_compiled_by_itself():
    model, optimizer = model_and_optimizer(fusedopt.FusedAdam)
    twin_model, twin = model_and_optimizer(fusedopt.FusedAdam)
    step = torch.compile(optimizer.step, backend="eager")
    for seed in range(4):
        for network in (model, twin_model):
            network.zero_grad()
            network(torch.full((1, 4), float(seed))).sum().backward()
        step()
        twin.step()
    assert_same_bits(tensors_of(optimizer), tensors_of(twin))


# torch.compile itself looks at the loss's gradient, with torch's own optimizers, too.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_step_with_a_closure_and_hooks():
    results = []
    for compile_step in (lambda f: f, compiled):
        model, optimizer = model_and_optimizer(fusedopt.FusedAdam)
        seen = []
        optimizer.register_step_post_hook(lambda o, args, kwargs, seen=seen: seen.append(1))

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = model(torch.ones(2, 4)).square().sum()
            loss.backward()
            return loss

        step = compile_step(lambda optimizer=optimizer, closure=closure: optimizer.step(closure))
        losses = torch.stack([step().detach() for _ in range(3)])
        assert losses[2] < losses[0] and len(seen) == 3
        results.append({**tensors_of(optimizer), "losses": losses})
    assert_same_bits(*results)


def test_refusal_comes_through():
    model, optimizer = model_and_optimizer(fusedopt.FusedAdam, nonfinite="raise")
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    for p in model.parameters():
        p.grad = torch.full_like(p, float("nan"))
    for _ in range(2):
        with pytest.raises(fusedopt.NonFiniteGradientError, match="parameter 0"):
            step()


# Clipping by itself


CLIPS = {
    "clip_grad_norm_": lambda params: fusedopt.clip_grad_norm_(iter(params), 0.5),
    "inf norm": lambda params: fusedopt.clip_grad_norm_(params, 0.5, norm_type=float("inf")),
    "other norm": lambda params: fusedopt.clip_grad_norm_(params, 0.5, 3.0),
    "error_if_nonfinite": lambda params: fusedopt.clip_grad_norm_(params, 0.5, 2.0, True),
    "reference": lambda params: fusedopt.clip_grad_norm_(params, 0.5, backend="reference"),
    "get_total_norm": lambda params: fusedopt.get_total_norm([p.grad for p in params]),
    "clip_grads_with_norm_": lambda params: fusedopt.clip_grads_with_norm_(params, 0.5, 3.0),
}


@pytest.mark.parametrize("name", CLIPS)
def test_compiled_clipping(name):
    clip = CLIPS[name]
    results = []
    for compile_step in (lambda f: f, compiled):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Linear(5, 2))

        @compile_step
        def train(x, model=model):
            model.zero_grad()
            model(x).square().sum().backward()
            norm = clip(list(model.parameters()))
            return x.sum() if norm is None else norm * 2

        norms = torch.stack([train(torch.full((3, 4), float(i))).detach() for i in range(3)])
        grads = {name: p.grad for name, p in model.named_parameters()}
        results.append({**grads, "norms": norms})
    assert_same_bits(*results)
    broken_at = [reason for reason in counters["graph_break"] if "fusedopt" in reason.lower()]
    assert len(broken_at) == 1 and "clip_grad" in broken_at[0]


def test_compiled_clipping_of_a_models_parameters():
    model, _ = model_and_optimizer(fusedopt.FusedAdam)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    clip = compiled(lambda: fusedopt.clip_grad_norm_(model.parameters(), 1.0))
    assert clip() > 1
    torch.testing.assert_close(clip(), torch.tensor(1.0))


def test_refusal_of_clipping_comes_through():
    model, _ = model_and_optimizer(fusedopt.FusedAdam)
    for p in model.parameters():
        p.grad = torch.full_like(p, float("nan"))
    clip = compiled(lambda: fusedopt.clip_grad_norm_(list(model.parameters()), 1.0, 2.0, True))
    with pytest.raises(RuntimeError, match="is non-finite"):
        clip()
