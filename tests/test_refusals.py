"""Bad input is refused with these messages, and a refusal changes nothing."""

from __future__ import annotations

import collections
import copy
import math

import pytest
import torch
from cases import CLASSES, assert_same_bits, make_params, set_grads, snapshot, tensors_of

import fusedopt
from fusedopt.core import checks


class Wrapper(torch.Tensor):
    """Without memory of its own: its operations are those of a tensor that it holds."""

    @staticmethod
    def __new__(cls, inner, requires_grad=False):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=inner.device, requires_grad=requires_grad
        )

    def __init__(self, inner, requires_grad=False):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        bare = [arg.inner if isinstance(arg, Wrapper) else arg for arg in args]
        return func(*bare, **(kwargs or {}))


@pytest.fixture
def trained(backend):
    """An optimizer of named parameters, with a step behind it; the last one has no state."""
    params = make_params([(4, 5), (33,), (2,)], device=backend.device)
    named = list(zip(("first", "second", "last"), params))
    optimizer = backend.make(fusedopt.FusedAdam, [{"params": named[:1]}, {"params": named[1:]}])
    set_grads(params[:2], 0)
    optimizer.step()
    set_grads(params, 1)
    return optimizer


def params_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def check_refusal(optimizer, error, *words):
    """The step raises, the message has these words, and nothing has changed."""
    groups = copy.deepcopy([{**g, "params": None} for g in optimizer.param_groups])
    before = snapshot(optimizer)
    kept = {p: dict(state) for p, state in optimizer.state.items()}
    for _ in range(2):
        with pytest.raises(error) as caught:
            optimizer.step()
        assert type(caught.value) is error
        message = str(caught.value)
        assert all(word in message for word in words), message
        assert_same_bits(tensors_of(optimizer), before)
        assert [{**g, "params": None} for g in optimizer.param_groups] == groups
        for param, state in optimizer.state.items():
            assert state.keys() == kept[param].keys()
            assert all(value is kept[param][key] for key, value in state.items())
        assert optimizer.state.keys() == kept.keys()
        assert optimizer.skipped_steps == 0


def test_sparse_gradient(trained):
    param = params_of(trained)[0]
    param.grad = torch.eye(4, 5, device=param.device).to_sparse()
    check_refusal(trained, RuntimeError, "'first'", "sparse", "not supported")


def test_sparse_gradient_at_the_first_step(backend):
    params = make_params([(3,), (4, 5)], device=backend.device)
    optimizer = backend.make(fusedopt.FusedAdam, params)
    set_grads(params, 0)
    params[1].grad = params[1].grad.to_sparse()
    check_refusal(optimizer, RuntimeError, "parameter 1 of param group 0", "sparse")
    assert not optimizer.state


def test_gradient_without_memory_of_its_own(trained):
    param = params_of(trained)[1]
    param.grad = Wrapper(torch.randn(33, device=param.device))
    check_refusal(trained, TypeError, "'second'", "Wrapper", "plain tensor")


def test_gradient_of_another_shape(trained):
    param = params_of(trained)[2]
    param.data = torch.randn(3, device=param.device)
    check_refusal(trained, RuntimeError, "'last'", "(2,)", "(3,)")


def test_integer_and_complex_gradients(trained):
    param = params_of(trained)[0]
    for dtype in (torch.int32, torch.complex64):
        param.grad, param.grad_dtype = None, None
        param.grad = torch.ones(4, 5, dtype=dtype, device=param.device)
        check_refusal(trained, TypeError, "gradient", "'first'", str(dtype), "float32, float64")


def test_gradient_on_another_device():
    """Calls the check itself: autograd refuses such a gradient without a second device."""
    with pytest.raises(RuntimeError, match=r"gradient of 'w' is on meta; .* parameter's cpu"):
        checks.check_grad(torch.zeros(3), torch.zeros(3, device="meta"), "'w'")


@pytest.mark.parametrize(
    ("swap", "error", "words"),
    [
        (lambda p: p.to(torch.complex64), TypeError, ["complex64", "float32"]),
        (lambda p: p[:1].expand(p.shape), RuntimeError, ["strides (0,)", "expanded"]),
    ],
    ids=["complex", "expanded"],
)
def test_parameter_that_became_unfit(trained, swap, error, words):
    param = params_of(trained)[1]
    kept = param.data
    before = snapshot(trained)
    param.grad = None
    param.data = swap(kept)
    with pytest.raises(error) as caught:
        trained.step()
    assert all(word in str(caught.value) for word in ["'second'", *words])
    param.data = kept
    assert_same_bits(tensors_of(trained), before)


def training(tensor):
    return tensor.requires_grad_()


def with_grad(tensor):
    """One that can't require gradients, or that is accepted without one, and has one."""
    tensor.grad = torch.zeros_like(tensor)
    return tensor


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: training(torch.zeros(3, dtype=torch.complex64)), TypeError, ["complex64"]),
        (lambda: with_grad(torch.zeros(3, dtype=torch.int64)), TypeError, ["int64", "float16"]),
        (lambda: training(torch.zeros(3).to(torch.float8_e4m3fn)), TypeError, ["float8_e4m3fn"]),
        (lambda: with_grad(torch.zeros(3, device="meta")), RuntimeError, ["meta", "cpu or cuda"]),
        (lambda: torch.zeros(1).expand(3), RuntimeError, ["strides (0,)", "expanded"]),
        (lambda: torch.zeros(9).as_strided((3, 3), (1, 2)), RuntimeError, ["(3, 3)", "(1, 2)"]),
        (lambda: training(torch.eye(3).to_sparse()), TypeError, ["sparse", "dense"]),
        (lambda: Wrapper(torch.zeros(3), True), TypeError, ["Wrapper", "plain tensor"]),
        (lambda: None, TypeError, ["NoneType"]),
    ],
    ids=[
        "complex",
        "integer",
        "float8",
        "meta",
        "expanded",
        "overlap",
        "sparse",
        "wrapper",
        "none",
    ],
)
def test_parameter_that_is_refused_at_construction_and_when_added(trained, make, error, words):
    before = snapshot(trained)
    groups = list(trained.param_groups)
    with params_of(trained)[0].device:  # else it is refused for being elsewhere
        good, bad = torch.zeros(2, requires_grad=True), make()
    for added in ([("bad", bad)], [("good", good), ("bad", bad)]):
        with pytest.raises(error) as caught:
            trained.add_param_group({"params": added, "lr": 3.0})
        assert all(word in str(caught.value) for word in words), str(caught.value)
        assert trained.param_groups == groups
    with pytest.raises(error) as caught:
        fusedopt.FusedAdam([bad])
    assert all(word in str(caught.value) for word in words)
    trained.step()
    assert tensors_of(trained).keys() - before.keys() == {"step 2", "exp_avg 2", "exp_avg_sq 2"}


def test_groups_that_torch_refuses_leave_the_optimizer_as_it_was(trained):
    groups = list(trained.param_groups)
    with pytest.raises(ValueError, match="more than one parameter group"):
        trained.add_param_group({"params": [("again", params_of(trained)[0])]})
    with pytest.raises(TypeError, match="must be a dict"):
        trained.add_param_group([params_of(trained)[0]])
    with pytest.raises(RuntimeError, match="differentiable"):
        trained.add_param_group({"params": [("new", torch.zeros(2))], "differentiable": True})
    assert trained.param_groups == groups
    trained.step()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            lambda s: s.update(exp_avg=s["exp_avg"].T),
            RuntimeError,
            ["'exp_avg'", "(5, 4)", "(4, 5)"],
        ),
        (lambda s: s.update(exp_avg=s["exp_avg"][:2]), RuntimeError, ["'exp_avg'", "(2, 5)"]),
        (
            lambda s: s.update(exp_avg=s["exp_avg"].double()),
            TypeError,
            ["float64", "torch.float32"],
        ),
        (lambda s: s.update(exp_avg=s["exp_avg"].half()), TypeError, ["float16", "torch.float32"]),
        (lambda s: s.update(exp_avg=0.5), TypeError, ["'exp_avg'", "float", "a plain tensor"]),
        (lambda s: s.update(step="3"), RuntimeError, ["'step'", "one number"]),
        (lambda s: s.update(step=torch.zeros(2)), RuntimeError, ["'step'", "one number"]),
        (lambda s: s.pop("exp_avg_sq"), RuntimeError, ["has no 'exp_avg_sq'", "'exp_avg'"]),
        (lambda s: s.pop("step"), RuntimeError, ["has no 'step'"]),
    ],
    ids=["transposed", "shape", "wide", "narrow", "float", "str", "two", "missing", "no step"],
)
def test_state_that_does_not_fit(trained, change, error, words):
    change(trained.state[params_of(trained)[0]])
    before = {p: dict(state) for p, state in trained.state.items()}
    with pytest.raises(error) as caught:
        trained.step()
    assert all(word in str(caught.value) for word in ["'first'", *words]), str(caught.value)
    for param, state in trained.state.items():
        assert all(value is before[param][key] for key, value in state.items())
    assert params_of(trained)[2] not in trained.state


@pytest.mark.parametrize(
    "state", [1, [2], torch.ones(2), collections.UserDict(step=1)], ids=lambda it: type(it).__name__
)
def test_state_that_is_no_dict_is_refused_by_name(trained, state):
    trained.state[params_of(trained)[0]] = state
    with pytest.raises(TypeError, match=f"'first'.* is a {type(state).__name__}; expected a dict"):
        trained.step()


@pytest.mark.parametrize("cls", [fusedopt.FusedAdam, fusedopt.FusedSGD])
@pytest.mark.parametrize("grad", [1.0, math.inf], ids=["step", "skip"])
@pytest.mark.parametrize("state", [None, collections.UserDict(), collections.UserDict(mine=1)])
def test_state_without_anything_of_ours_becomes_a_dict(backend, cls, grad, state):
    """One that a user put there before the first step, with whatever else is in it."""
    param = torch.ones(3, device=backend.device, requires_grad=True)
    param.grad = torch.full_like(param, grad)
    optimizer = backend.make(cls, [param], nonfinite="skip")
    optimizer.state[param] = copy.copy(state)
    optimizer.step()
    expected = backend.make(cls, [torch.ones_like(param)], nonfinite="skip")
    (twin,) = params_of(expected)
    twin.grad = param.grad.clone()
    expected.step()
    assert_same_bits({"param": param.detach()}, {"param": twin.detach()})
    kept = dict(optimizer.state.get(param) or {})
    assert kept.pop("mine", None) == (state or {}).get("mine")
    assert kept.keys() == expected.state[twin].keys()
    optimizer.step()


def test_state_of_16_bits_that_mixes_dtypes(backend):
    params = make_params([(5,)], torch.bfloat16, backend.device)
    optimizer = backend.make(fusedopt.FusedAdam, params)
    set_grads(params, 0)
    optimizer.step()
    optimizer.state[params[0]]["exp_avg"] = optimizer.state[params[0]]["exp_avg"].float()
    check_refusal(optimizer, TypeError, "mixes dtypes", "'exp_avg' is torch.float32", "bfloat16")


def test_option_that_asks_for_state_that_is_not_there(trained):
    trained.param_groups[0]["amsgrad"] = True
    check_refusal(trained, RuntimeError, "'first'", "has no 'max_exp_avg_sq'")


BAD_OPTIONS = [
    ({"betas": (0.9,)}, ValueError, r"betas is \(0.9,\); expected 2 numbers"),
    ({"betas": (0.9, 0.99, 0.999)}, ValueError, "betas is .*expected 2 numbers"),
    ({"betas": 0.9}, TypeError, "betas is 0.9; expected 2 numbers"),
    ({"betas": (0.9, None)}, ValueError, "betas is .*expected 2 numbers"),
    ({"lr": (0.1, 0.2)}, ValueError, "lr is .*expected one number"),
    ({"lr": [0.1]}, ValueError, r"lr is \[0.1\]; expected one number"),
    ({"lr": None}, TypeError, "lr is None; expected one number"),
    ({"lr": "0.1"}, TypeError, "lr is '0.1'; expected one number"),
    ({"lr": 1j}, TypeError, "lr is 1j; expected one number"),
    ({"lr": torch.tensor([0.1, 0.2])}, ValueError, "lr is .*expected one number"),
    ({"lr": torch.tensor(0.1, device="meta")}, ValueError, "lr is .*expected one number"),
    ({"lr": 10**400}, TypeError, "lr is 1000.*expected one number"),
    ({"eps": "small"}, TypeError, "eps is 'small'; expected one number"),
    ({"maximize": "no"}, TypeError, "maximize is 'no'; expected one number"),
    ({"weight_decay": {}}, TypeError, "weight_decay is {}; expected one number"),
]


@pytest.mark.parametrize(("change", "error", "words"), BAD_OPTIONS, ids=str)
@pytest.mark.parametrize("backend_name", [None, "reference"])
def test_option_changed_to_what_it_can_not_be(trained, change, error, words, backend_name):
    if backend_name is not None:
        trained._backend = backend_name
        trained._plan = None
    before = snapshot(trained)
    trained.param_groups[1].update(change)
    for _ in range(2):
        with pytest.raises(error, match=f"param group 1's {words}"):
            trained.step()
    assert_same_bits(tensors_of(trained), before)


@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_any_option_that_is_no_number_is_named(backend, case):
    params = make_params([(3,), (4,)], device=backend.device)
    optimizer = backend.make(case.cls, [{"params": p} for p in params])
    set_grads(params, 0)
    group = optimizer.param_groups[1]
    for key in sorted(optimizer.defaults.keys() - set(checks.IMPLEMENTATION)):
        optimizer.step()  # what a refused step has looked at is looked at again
        before = snapshot(optimizer)
        kept = group[key]
        for value in (None, "x", [], object()):
            group[key] = value
            with pytest.raises((TypeError, ValueError), match=f"param group 1's {key} is "):
                optimizer.step()
        del group[key]
        with pytest.raises(ValueError, match=f"param group 1 has no '{key}'"):
            optimizer.step()
        group[key] = kept
        assert_same_bits(tensors_of(optimizer), before)
    optimizer.step()


@pytest.mark.parametrize("thing", [None, "weight", 3.0, [torch.zeros(2)]], ids=repr)
def test_parameter_that_is_no_tensor(trained, thing):
    before = snapshot(trained)
    trained.param_groups[0]["params"].append(thing)
    trained.param_groups[0]["param_names"].append("thing")
    with pytest.raises(
        TypeError, match=rf"'thing' .*is a {type(thing).__name__}; expected a tensor"
    ):
        trained.step()
    trained.param_groups[0]["params"].pop()
    assert_same_bits(tensors_of(trained), before)


def test_storage_that_was_freed_beneath_a_tensor(trained):
    """Sharding and offloading libraries do this."""
    first = params_of(trained)[0]
    named = {
        "'first'": first.data,
        "the gradient of 'first'": first.grad,
        "state 'exp_avg' of 'first'": trained.state[first]["exp_avg"],
    }
    before = snapshot(trained)
    for name, tensor in named.items():
        values = tensor.clone()
        tensor.untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match=f"^{name} .*storage of 0 bytes; expected 80"):
            trained.step()
        tensor.untyped_storage().resize_(80)
        tensor.copy_(values)
    assert_same_bits(tensors_of(trained), before)
    trained.step()


@pytest.mark.parametrize("option", ["lr", "weight_decay", "betas"])
@pytest.mark.parametrize("steps", [0, 1])
def test_option_whose_storage_was_freed(backend, option, steps):
    """torch's own functions read, and print, memory that is not there."""
    value = torch.tensor(0.5)
    (param,) = make_params([(3,)], device=backend.device)
    optimizer = backend.make(fusedopt.FusedAdam, [param], lr=torch.tensor(0.1))
    set_grads([param], 0)
    optimizer.param_groups[0][option] = (value, 0.9) if option == "betas" else value
    for _ in range(steps):
        optimizer.step()
    value.untyped_storage().resize_(0)
    before = param.detach().clone()
    with pytest.raises(RuntimeError, match=f"param group 0's {option} has a storage of 0 bytes"):
        optimizer.step()
    assert_same_bits({"param": param.detach()}, {"param": before})


def test_option_refused_at_the_first_step_leaves_no_state(backend):
    params = make_params([(3,)], device=backend.device)
    optimizer = backend.make(fusedopt.FusedAdam, params)
    optimizer.param_groups[0]["betas"] = (0.9,)
    params[0].grad = torch.ones_like(params[0])
    with pytest.raises(ValueError, match=r"betas is \(0.9,\); expected 2 numbers"):
        optimizer.step()
    assert not optimizer.state
