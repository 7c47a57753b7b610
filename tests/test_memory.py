"""Tensors that share memory, and tensors whose memory is gone."""

from __future__ import annotations

import pytest
import torch
from cases import CLASSES, assert_same_bits, make_params, same_bits, set_grads, snapshot, tensors_of
from torch import Tensor
from torch.nn import Parameter

import fusedopt


def ones_as_grads(params):
    for param in params:
        param.grad = torch.ones(param.shape, dtype=param.dtype, device=param.device)


# --- tensors that a step would write at once
def buffer(backend) -> Tensor:
    return torch.randn(100, generator=torch.Generator().manual_seed(0)).to(backend.device)


SHARED = {
    "the same elements": lambda b: [b, b],
    "some of the elements": lambda b: [b, b[90:]],
    "one within the other": lambda b: [b[10:], b[20:30]],
    "the last element": lambda b: [b[:50], b[49:]],
    "the same elements in another order": lambda b: [b.view(10, 10), b.view(10, 10).t()],
    "a row and a column": lambda b: [b.view(10, 10)[3], b.view(10, 10)[:, 5]],
    "every second and every third": lambda b: [b[::2], b[::3]],
    "another dtype": lambda b: [b, b.view(torch.bfloat16)[7:9]],
}
APART = {
    "halves": lambda b: [b[:50], b[50:]],
    "even and odd": lambda b: [b[::2], b[1::2]],
    "columns": lambda b: [b.view(10, 10)[:, 1], b.view(10, 10)[:, 7], b.view(10, 10)[:, 2:4]],
    "a row and a column beside it": lambda b: [b.view(10, 10)[3, 1:], b.view(10, 10)[4:, 0]],
    "no elements": lambda b: [b, b[50:50], b[50:50]],
}


@pytest.mark.parametrize("views", SHARED.values(), ids=SHARED)
def test_parameters_that_share_memory_are_refused_by_name(backend, views):
    memory = buffer(backend)
    params = [Parameter(view) for view in views(memory)]
    names = [(f"layer{i}", param) for i, param in enumerate(params)]
    optimizer = backend.make(fusedopt.FusedAdam, names)
    ones_as_grads(params)
    before = memory.clone()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"'layer1'.*shares memory with 'layer0'.*clone"):
            optimizer.step()
    assert same_bits(memory, before) and not optimizer.state
    params[1].data = params[1].data.clone()
    optimizer.step()


@pytest.mark.parametrize("views", APART.values(), ids=APART)
def test_views_of_one_buffer_that_lie_apart(backend, views):
    params = [Parameter(view) for view in views(buffer(backend))]
    twins = [Parameter(view.clone()) for view in views(buffer(backend))]
    both = [backend.make(fusedopt.FusedAdam, which) for which in (params, twins)]
    for seed in range(2):
        for which, optimizer in zip((params, twins), both):
            set_grads(which, seed)
            optimizer.step()
    assert all(same_bits(a, b.view_as(a)) for a, b in zip(params, twins))


def test_only_what_is_written_may_not_be_shared(backend):
    """Without a gradient a parameter is neither read nor written."""
    memory = buffer(backend)
    params = [Parameter(memory), Parameter(memory[10:20])]
    optimizer = backend.make(fusedopt.FusedAdam, params)
    for turn in (0, 1, 0, 1):
        optimizer.zero_grad()
        ones_as_grads([params[turn]])
        optimizer.step()
    ones_as_grads(params)
    with pytest.raises(RuntimeError, match="shares memory"):
        optimizer.step()


def test_state_in_memory_that_is_written_is_refused_by_name(backend):
    params = make_params([(20,), (20,)], device=backend.device)
    optimizer = backend.make(fusedopt.FusedAdam, params)
    ones_as_grads(params)
    optimizer.step()
    first, second = (optimizer.state[param] for param in params)
    for state, key, other in (
        (second, "exp_avg", first["exp_avg"]),
        (second, "exp_avg", second["exp_avg_sq"]),
        (second, "exp_avg", params[0].detach()),
        (second, "step", first["step"]),
    ):
        kept, state[key] = state[key], other
        before = snapshot(optimizer)
        with pytest.raises(RuntimeError, match=rf"'{key}' of parameter [01].*shares memory|shares"):
            optimizer.step()
        assert_same_bits(tensors_of(optimizer), before)
        state[key] = kept
    optimizer.step()


@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_gradient_in_memory_that_is_written(backend, case):
    """It is read as it was before the step."""
    runs = []
    for shared in (True, False):
        params = make_params([(40000,), (40000,)], device=backend.device)
        optimizer = backend.make(case.cls, params, max_grad_norm=1.0, **case.kwargs)
        for _ in range(2):
            views = [params[1].detach(), params[0].detach()]
            for param, view in zip(params, views):
                param.grad = view if shared else view.clone()
            optimizer.step()
        runs.append(tensors_of(optimizer))
    assert_same_bits(*runs)


def test_clipped_gradients_that_share_memory_are_refused_by_name(backend):
    memory = torch.ones(40, device=backend.device)
    params = [Parameter(torch.zeros(30, device=backend.device)) for _ in range(2)]
    params[0].grad, params[1].grad = memory[:30], memory[10:]
    name = "cpu" if backend.name == "cpu" else "cuda"
    with pytest.raises(RuntimeError, match="gradient of parameter 1 shares memory with the grad"):
        fusedopt.clip_grad_norm_(params, 1.0, backend=name)
    assert (memory == 1).all()
    fusedopt.clip_grad_norm_(params, 100.0 / 3 * 10, backend="reference")


# --- memory that was freed, cut, moved or shared until it is written
@pytest.mark.parametrize("nbytes", [0, 4, 76])
@pytest.mark.parametrize("what", ["parameter", "gradient", "exp_avg", "step"])
def test_storage_that_is_cut_after_a_step_is_refused_by_name(backend, what, nbytes):
    (param,) = make_params([(20,)], device=backend.device)
    optimizer = backend.make(fusedopt.FusedAdam, [("weight", param)], max_grad_norm=1.0)
    param.grad = torch.ones_like(param)
    for _ in range(2):
        optimizer.step()
    state = optimizer.state[param]
    tensor = {"parameter": param, "gradient": param.grad}.get(what)
    tensor = state[what] if tensor is None else tensor
    tensor.untyped_storage().resize_(min(nbytes, 4 * tensor.numel() - 4))
    with pytest.raises(RuntimeError, match=r"'weight' .*has a storage of \d+ bytes; expected"):
        optimizer.step()


@pytest.mark.parametrize("call", [
    lambda p, **kw: fusedopt.clip_grad_norm_(p, 1.0, **kw),
    lambda p, **kw: fusedopt.get_total_norm([p.grad], **kw),
    lambda p, **kw: fusedopt.clip_grads_with_norm_(p, 1.0, 2.0, **kw),
])  # fmt: skip
def test_clipping_a_gradient_whose_storage_was_cut(backend, call):
    (param,) = make_params([(20000,)], device=backend.device)
    param.grad = torch.ones_like(param)
    param.grad.untyped_storage().resize_(8)
    with pytest.raises(RuntimeError, match="has a storage of 8 bytes; expected 80000"):
        call(param, backend="cpu" if backend.name == "cpu" else "cuda")


@pytest.mark.parametrize("what", ["parameter", "exp_avg", "step", "gradient"])
def test_copy_on_write_snapshot_keeps_its_values(backend, what):
    (param,) = make_params([(20,)], device=backend.device)
    optimizer = backend.make(fusedopt.FusedAdam, [param])
    param.grad = torch.ones_like(param)
    for _ in range(3):
        tensor = {"parameter": param, "gradient": param.grad}.get(what)
        tensor = optimizer.state.get(param, {}).get(what) if tensor is None else tensor
        if tensor is not None:
            copy, value = torch._lazy_clone(tensor.detach()), tensor.detach().clone()
            optimizer.step()
            assert same_bits(copy, value)
            assert what == "gradient" or not same_bits(tensor.detach(), value)
        else:
            optimizer.step()


def test_clipping_leaves_a_copy_on_write_snapshot_alone(backend):
    (param,) = make_params([(20,)], device=backend.device)
    param.grad = torch.ones_like(param)
    copy = torch._lazy_clone(param.grad)
    fusedopt.clip_grad_norm_(param, 0.5, backend="cpu" if backend.name == "cpu" else "cuda")
    assert (copy == 1).all() and (param.grad < 1).all()


@pytest.mark.parametrize("what", ["parameters", "states", "both"])
def test_tensors_that_move_need_no_new_plan(backend, what):
    def take_steps(moves):
        params = make_params([(33,), (4, 5), (16385,)], device=backend.device)
        optimizer = backend.make(fusedopt.FusedAdam, params, max_grad_norm=1.0)
        for seed in range(4):
            set_grads(params, seed)
            if moves and seed > 1:
                for param in params:
                    state = optimizer.state[param]
                    if what != "states":
                        param.data = param.data.clone()
                    if what != "parameters":
                        state["exp_avg"] = state["exp_avg"].clone()
                        state["exp_avg_sq"].data = state["exp_avg_sq"].clone()
                        state["step"] = state["step"].clone()
            plan = optimizer._plan
            optimizer.step()
            assert seed < 2 or optimizer._plan is plan
        return tensors_of(optimizer)

    assert_same_bits(take_steps(True), take_steps(False))


def test_parameter_that_moves_into_memory_of_another_is_refused(backend):
    params = make_params([(20,), (20,)], device=backend.device)
    optimizer = backend.make(fusedopt.FusedAdam, params)
    ones_as_grads(params)
    optimizer.step()
    params[1].data = params[0].data
    with pytest.raises(RuntimeError, match=r"parameter 1 .* shares memory with parameter 0"):
        optimizer.step()


def test_negative_view_of_the_same_memory_is_noticed(backend):
    (param,) = make_params([(20,)], device=backend.device)
    twin = Parameter(-param.detach())
    both = backend.make(fusedopt.FusedAdam, [param]), backend.make(fusedopt.FusedAdam, [twin])
    for optimizer, it, sign in zip(both, (param, twin), (1, -1)):
        it.grad = sign * torch.ones(20, device=backend.device)
        optimizer.step()
    param.data = torch._neg_view(param.data)
    param.grad = -torch.ones(20, device=backend.device)
    for optimizer in both:
        optimizer.state.clear()
        optimizer.step()
    assert torch.equal(param, twin)


def test_negative_gradient_of_another_dtype(backend):
    """torch's copy_ takes the negative wrong between float16 and float32."""
    param = Parameter(torch.zeros(20, dtype=torch.bfloat16, device=backend.device))
    param.grad_dtype = None
    param.grad = torch._neg_view(torch.ones(20, dtype=torch.float16, device=backend.device))
    backend.make(fusedopt.FusedSGD, [param], lr=1.0).step()
    assert (param == 1).all()


# --- versions
def test_a_skipped_step_leaves_versions_alone(backend):
    params = make_params([(20,), (4, 5)], device=backend.device)
    params[1].data = params[1].data.t()  # with a copy, for the kernels
    optimizer = backend.make(fusedopt.FusedAdam, params, nonfinite="skip")
    set_grads(params, 0)
    optimizer.step()
    versions = [param._version for param in params]
    params[0].grad[3] = torch.inf
    optimizer.step()
    if backend.name != "cuda":  # there nobody waits to learn of it
        assert [param._version for param in params] == versions
    params[0].grad[3] = 1
    optimizer.step()
    assert all(param._version > version for param, version in zip(params, versions))


def test_clipping_that_changes_nothing_leaves_versions_alone(backend):
    if backend.name == "cuda":
        pytest.skip("there nobody waits to learn of it")
    (param,) = make_params([(20,)], device=backend.device)
    param.grad = torch.ones(20, 2, device=backend.device)[:, 0]
    other = Parameter(torch.ones(20, device=backend.device))
    other.grad = torch.ones(20, device=backend.device)
    name = "cpu" if backend.name == "cpu" else "cuda"
    versions = param.grad._version, other.grad._version
    fusedopt.clip_grad_norm_([param, other], 100.0, backend=name)
    assert (param.grad._version, other.grad._version) == versions
    fusedopt.clip_grad_norm_([param, other], 1.0, backend=name)
    assert param.grad._version > versions[0] and other.grad._version > versions[1]
