"""A load takes over the same tensors of a checkpoint as torch does, and copies all others."""

from __future__ import annotations

import copy
import mmap
import sys
from collections import OrderedDict, UserDict

import pytest
import torch
from cases import CLASSES, assert_same_bits, make_params, set_grads, tensors_of
from torch.nn import Parameter

import fusedopt

SHAPES = [(33,), (4, 5), ()]


def checkpoint_of(cls, params, **options):
    source = cls([p.detach().clone().requires_grad_() for p in params], **options)
    set_grads(source.param_groups[0]["params"], 0)
    source.step()
    return source.state_dict()


def taken_over(optimizer, checkpoint):
    """For each state of the checkpoint, whether the optimizer now uses this tensor."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        (i, key): optimizer.state[params[i]][key] is value
        for i, state in checkpoint["state"].items()
        for key, value in state.items()
        if isinstance(value, torch.Tensor)
    }


@pytest.mark.parametrize("source", ["ours", "torch's", "a file"])
@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_what_fits_is_taken_over(backend, case, source, tmp_path):
    if source == "a file" and sys.platform != "linux":
        pytest.skip("only Linux tells that the memory of a loaded file is the process's own")
    params = make_params(SHAPES, device=backend.device)
    if source == "torch's":
        checkpoint = checkpoint_of(case.twin, params, **case.kwargs)
    else:
        checkpoint = checkpoint_of(
            lambda *a, **k: backend.make(case.cls, *a, **k), params, **case.kwargs
        )
    if source == "a file":
        torch.save(checkpoint, tmp_path / "checkpoint.pt")
        checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    optimizer = backend.make(case.cls, params, **case.kwargs)
    optimizer.load_state_dict(checkpoint)
    found = taken_over(optimizer, checkpoint)
    assert found and all(found.values()), found
    set_grads(params, 1)
    optimizer.step()
    found = taken_over(optimizer, checkpoint)
    assert all(found.values())  # and they stay where they are


def load(state, params=None, cls=fusedopt.FusedAdam):
    params = make_params([(64,), (64,)]) if params is None else params
    optimizer = cls(params)
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    return optimizer


def adam_state(value=1.0, step=3.0):
    return {
        "step": torch.tensor(step),
        "exp_avg": torch.full((64,), value),
        "exp_avg_sq": torch.full((64,), value),
    }


def in_inference_mode():
    with torch.inference_mode():
        return torch.ones(64)


def shared_with_a_process():
    return torch.ones(64).share_memory_()


def of_a_read_only_file():
    numpy = pytest.importorskip("numpy")
    pages = mmap.mmap(-1, 4096)  # another process could have it
    return torch.from_numpy(numpy.frombuffer(pages, numpy.float32, 64)).fill_(1.0)


UNFIT = {
    "of inference mode": in_inference_mode,
    "of autograd": lambda: torch.ones(64, requires_grad=True),
    "a result of autograd": lambda: torch.ones(64, requires_grad=True) * 1,
    "shared with a process": shared_with_a_process,
    "of a mapping": of_a_read_only_file,
    "strided": lambda: torch.ones(128)[::2],
    "expanded": lambda: torch.ones(1).expand(64),
    "negated lazily": lambda: torch._neg_view(torch.full((64,), -1.0)),
    "of another dtype": lambda: torch.ones(64, dtype=torch.float64),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_what_can_not_be_written_to_alone_is_copied(kind):
    state = {0: adam_state(), 1: adam_state()}
    unfit = state[0]["exp_avg"] = UNFIT[kind]()
    optimizer = load(state)
    first, second = optimizer.param_groups[0]["params"]
    loaded = optimizer.state[first]["exp_avg"]
    assert loaded is not unfit and loaded.data_ptr() != unfit.data_ptr()
    assert loaded.tolist() == [1.0] * 64
    assert optimizer.state[second]["exp_avg"] is state[1]["exp_avg"]
    set_grads([first, second], 0)
    optimizer.step()
    assert unfit.tolist() == [1.0] * 64


@pytest.mark.parametrize("shared", [None, mmap.MAP_SHARED], ids=["private", "shared"])
def test_a_mapped_file_is_copied_and_stays_as_it_is(shared, tmp_path):
    path = tmp_path / "checkpoint.pt"
    params = make_params(SHAPES)
    torch.save(checkpoint_of(fusedopt.FusedAdam, params), path)
    before = path.read_bytes()
    flags = mmap.MAP_PRIVATE if shared is None else shared
    with torch.serialization.set_default_mmap_options(flags):
        checkpoint = torch.load(path, mmap=True, weights_only=True)
    optimizer = fusedopt.FusedAdam(params)
    optimizer.load_state_dict(checkpoint)
    assert not any(taken_over(optimizer, checkpoint).values())
    set_grads(params, 1)
    optimizer.step()
    assert path.read_bytes() == before
    again = torch.load(path, weights_only=True)
    for i, state in again["state"].items():
        assert all(torch.equal(v, checkpoint["state"][i][k]) for k, v in state.items())


def test_states_that_share_memory_are_copied():
    whole = torch.ones(100)
    state = {0: adam_state(), 1: adam_state()}
    state[0]["exp_avg"], state[1]["exp_avg"] = whole[:64], whole[36:]
    state[0]["step"] = state[1]["step"] = torch.tensor(3.0)
    state[1]["exp_avg_sq"] = state[0]["exp_avg_sq"]
    optimizer = load(state)
    copies = [copy.deepcopy(adam_state()), copy.deepcopy(adam_state())]
    expected = load(dict(enumerate(copies)))
    tensors = [t for p in optimizer.param_groups[0]["params"] for t in optimizer.state[p].values()]
    assert len({t.data_ptr() for t in tensors}) == 6
    for it in (optimizer, expected):
        set_grads(it.param_groups[0]["params"], 0)
        it.step()
    assert_same_bits(tensors_of(optimizer), tensors_of(expected))


def test_neighbors_in_one_storage_are_taken_over():
    whole = torch.ones(128)
    state = {0: adam_state(), 1: adam_state()}
    state[0]["exp_avg"], state[1]["exp_avg"] = whole[:64], whole[64:]
    optimizer = load(state)
    assert all(taken_over(optimizer, {"state": state}).values())


@pytest.mark.parametrize("what", ["parameter", "gradient"])
def test_state_in_the_memory_of_a_parameter_is_copied(what):
    params = make_params([(64,), (64,)])
    set_grads(params, 0)
    state = {0: adam_state(), 1: adam_state()}
    state[0]["exp_avg"] = params[1].detach() if what == "parameter" else params[1].grad
    optimizer = load(state, params)
    loaded = optimizer.state[params[0]]["exp_avg"]
    assert loaded.data_ptr() != state[0]["exp_avg"].data_ptr()
    assert torch.equal(loaded, state[0]["exp_avg"])


def test_an_optimizer_that_is_loaded_into_itself_keeps_its_tensors():
    params = make_params(SHAPES)
    optimizer = fusedopt.FusedAdam(params, max_grad_norm=1.0, telemetry=4)
    set_grads(params, 0)
    optimizer.step()
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    assert all(taken_over(optimizer, saved).values())
    assert optimizer.telemetry().step.tolist() == [1]


def test_two_optimizers_share_what_was_not_copied_as_torchs_do():
    found = {}
    for cls in (torch.optim.RMSprop, fusedopt.FusedRMSprop):
        params = make_params(SHAPES)
        checkpoint = checkpoint_of(cls, params)
        other = cls(params)
        other.load_state_dict(checkpoint)
        set_grads(params, 1)
        other.step()
        found[cls] = [int(state["step"]) for state in checkpoint["state"].values()]
    assert found[torch.optim.RMSprop] == found[fusedopt.FusedRMSprop] == [2, 2, 2]


# --- what a user keeps in the state


def test_a_users_own_state_is_the_same_object_afterwards():
    optimizers = [cls([Parameter(torch.ones(2))]) for cls in (torch.optim.Adam, fusedopt.FusedAdam)]
    for optimizer in optimizers:
        (param,) = optimizer.param_groups[0]["params"]
        mine, function = {param: torch.zeros(2)}, lambda: None
        optimizer.state["mine"], optimizer.state["function"] = mine, function
        param.grad = torch.ones(2)
        optimizer.step()
        extra = optimizer.state[param]["extra"] = torch.ones(3)
        nested = optimizer.state[param]["nested"] = {"list": [extra, "word"], "pair": (extra, 1)}
        optimizer.load_state_dict(optimizer.state_dict())
        assert optimizer.state["mine"] is mine and optimizer.state["function"] is function
        loaded = optimizer.state[param]
        assert loaded["extra"] is extra and loaded["nested"]["list"][0] is extra
        assert loaded["nested"]["pair"][0] is extra
    assert loaded["nested"] == nested


# --- any mapping, any sequence


class View(UserDict):
    """A mapping that is not a dict."""


@pytest.mark.parametrize("kind", [OrderedDict, View])
def test_any_mapping_is_a_checkpoint(kind):
    params = make_params(SHAPES)
    checkpoint = checkpoint_of(fusedopt.FusedAdam, params)
    states = kind({i: kind(state) for i, state in checkpoint["state"].items()})
    groups = tuple(kind({**g, "params": range(3)}) for g in checkpoint["param_groups"])
    optimizer = fusedopt.FusedAdam(params)
    optimizer.load_state_dict(kind({"state": states, "param_groups": groups}))
    assert all(taken_over(optimizer, checkpoint).values())
    assert all(type(optimizer.state[p]) is dict for p in params)
    assert type(optimizer.param_groups) is list and type(optimizer.param_groups[0]) is dict
    set_grads(params, 1)
    optimizer.step()


def test_a_step_of_one_element():
    state = {0: adam_state(), 1: adam_state()}
    state[0]["step"] = torch.tensor([3.0])
    optimizer = load(state)
    params = optimizer.param_groups[0]["params"]
    set_grads(params, 0)
    optimizer.step()
    assert [optimizer.state[p]["step"].tolist() for p in params] == [4.0, 4.0]
    optimizer.state[params[0]]["step"] = torch.tensor([[3.0]])
    optimizer.step()
    assert [optimizer.state[p]["step"].tolist() for p in params] == [4.0, 5.0]


@pytest.mark.parametrize("cls", [fusedopt.FusedAdam, fusedopt.FusedSGD])
def test_state_that_is_no_dict_is_refused_as_soon_as_its_parameter_has_a_gradient(backend, cls):
    """Also by a rule that keeps no state, and after a step that has left it alone."""
    param = torch.ones(3, device=backend.device, requires_grad=True)
    optimizer = backend.make(cls, [param])
    optimizer.state[param] = 1
    optimizer.step()
    param.grad = torch.ones_like(param)
    for _ in range(2):
        with pytest.raises(TypeError, match=r"state of parameter 0 .* is a int; expected a dict"):
            optimizer.step()
    assert param.tolist() == [1.0, 1.0, 1.0]
