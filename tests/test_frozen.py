"""A parameter of any kind is left alone without a gradient, and refused by name with one."""

from __future__ import annotations

import pytest
import torch
from cases import CLASSES, make_params, same_bits, set_grads
from conftest import under_test
from test_refusals import Wrapper
from torch.nn import Parameter

import fusedopt

LIMITS = [
    None,
    0.5,
    fusedopt.clip.ZScore(warmup=1),
    fusedopt.clip.PerTensor(warmup=1),
    fusedopt.clip.Unit(),
]
FROZEN = {
    "int8": lambda: torch.arange(4, dtype=torch.int8),
    "uint8": lambda: torch.arange(5000, dtype=torch.uint8),
    "float8": lambda: torch.ones(4).to(torch.float8_e4m3fn),
    "complex": lambda: torch.ones(3, 2, dtype=torch.complex64),
    "bool": lambda: torch.ones(4, dtype=torch.bool),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "meta": lambda: torch.empty(40000, device="meta"),
    "subclass": lambda: Wrapper(torch.ones(3, 4)),
    "transposed": lambda: torch.ones(3, 4).t().to(torch.int32),
}


class Reference:
    device = "cpu"

    @staticmethod
    def make(cls, params, **kwargs):
        return cls(params, backend="reference", **kwargs)


@pytest.fixture(params=["reference", "cpu", "emulated", "cuda"])
def any_backend(request, monkeypatch):
    """A compiled backend, or the reference."""
    return Reference if request.param == "reference" else under_test(request.param, monkeypatch)


def frozen_param(kind, device):
    with torch.device(device):
        value = FROZEN[kind]()
    return value if isinstance(value, Wrapper) else Parameter(value, requires_grad=False)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("kind", FROZEN)
@pytest.mark.parametrize("limit", LIMITS, ids=str)
@pytest.mark.parametrize("telemetry", [None, 4])
def test_frozen_parameters_change_nothing_for_the_others(any_backend, kind, limit, telemetry):
    frozen = frozen_param(kind, any_backend.device)
    params, twins = (make_params([(5,), (16385,)], device=any_backend.device) for _ in range(2))
    options = {"max_grad_norm": limit, "telemetry": telemetry}
    named = [("frozen", frozen), ("a", params[0]), ("b", params[1])]
    optimizer = any_backend.make(fusedopt.FusedAdam, named, **options)
    twin = any_backend.make(fusedopt.FusedAdam, [("a", twins[0]), ("b", twins[1])], **options)
    for seed in range(3):
        for its, one in ((params, optimizer), (twins, twin)):
            set_grads(its, seed)
            one.step()
        assert all(map(same_bits, params, twins))
        assert optimizer.grad_norm == twin.grad_norm > 0
    if telemetry is not None:
        assert "a" in optimizer.telemetry().params and "frozen" not in optimizer.explain()
    assert set(optimizer.state) == set(params)
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["params"] == [0, 1, 2] and set(saved["state"]) == {1, 2}
    optimizer.load_state_dict(saved)
    set_grads(params, 3)
    optimizer.step()
    if limit is not None:
        params[1].grad[7] = torch.inf
        optimizer.step()
        assert optimizer.step_skipped


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_frozen_parameters_of_all_kinds_in_groups_of_their_own(any_backend, case):
    if case.cls is fusedopt.FusedAdagrad:
        pytest.skip("its constructor makes state for all of them, as torch's, which refuses some")
    frozen = [frozen_param(kind, any_backend.device) for kind in FROZEN]
    params = make_params([(5,)], device=any_backend.device)
    optimizer = any_backend.make(case.cls, [{"params": frozen}], **case.kwargs)
    optimizer.step()  # there is nothing to do
    optimizer.add_param_group({"params": params})
    before = params[0].detach().clone()
    set_grads(params, 0)
    optimizer.step()
    assert not torch.equal(params[0], before)


def test_model_without_data_is_accepted_until_it_has_a_gradient(any_backend):
    net = torch.nn.Linear(3, 2, device="meta")
    optimizer = any_backend.make(fusedopt.FusedAdam, net.named_parameters(), max_grad_norm=1.0)
    optimizer.step()
    net(torch.ones(1, 3, device="meta")).sum().backward()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"'weight' .*meta device, without data"):
            optimizer.step()
    assert not optimizer.state


def test_model_that_gets_its_data_after_the_optimizer_is_made(any_backend):
    net = torch.nn.Linear(3, 2, device="meta")
    optimizer = any_backend.make(fusedopt.FusedAdam, net.named_parameters(), max_grad_norm=1.0)
    for param in net.parameters():
        data = torch.ones(param.shape, device=any_backend.device)
        torch.utils.swap_tensors(param, Parameter(data))
    net(torch.ones(1, 3, device=any_backend.device)).sum().backward()
    optimizer.step()
    assert (net.weight < 1).all() and (net.bias < 1).all()


@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_frozen_parameter_that_gets_a_gradient_is_named(any_backend, case):
    with torch.device(any_backend.device):
        bad = Parameter(torch.ones(3, dtype=torch.complex64), requires_grad=False)
        params = [Parameter(torch.ones(3)), bad]
    named = list(zip(("good", "bad"), params))
    optimizer = any_backend.make(case.cls, named, **case.kwargs)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    before = params[0].detach().clone()
    bad.grad = torch.ones_like(bad)
    for _ in range(2):
        with pytest.raises(TypeError, match=r"'bad' .*is torch.complex64; expected float32"):
            optimizer.step()
    assert torch.equal(params[0], before)
    bad.grad = None
    optimizer.step()
    assert not torch.equal(params[0], before)


def test_kept_state_of_a_parameter_whose_data_is_elsewhere(any_backend):
    """As libraries do that move a model's parts off to the disk, and leave the meta device."""
    params = make_params([(5,), (3,)], device=any_backend.device)
    optimizer = any_backend.make(fusedopt.FusedAdam, params)
    set_grads(params, 0)
    optimizer.step()
    average, kept = optimizer.state[params[1]]["exp_avg"], params[1].data
    params[1].grad = None
    elsewhere = Parameter(torch.empty(3, device="meta"))
    torch.utils.swap_tensors(params[1], elsewhere)
    set_grads(params[:1], 1)
    optimizer.step()
    assert optimizer.state[params[1]]["exp_avg"] is average
    torch.utils.swap_tensors(params[1], elsewhere)
    assert same_bits(params[1], kept)
    set_grads(params, 2)
    optimizer.step()
    assert optimizer.state[params[1]]["step"] == 2
