"""Checkpoints and copies of an optimizer, torch's and ours."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from cases import CASES, CLASSES, assert_same_bits, make_params, set_grads, tensors_of

import fusedopt

SHAPES = [(33,), (4, 5), (16385,)]


def train(optimizer, seeds):
    for seed in seeds:
        set_grads([p for group in optimizer.param_groups for p in group["params"]], seed)
        optimizer.step()


def tensors_kept_by_torch(optimizer):
    """All but mu_product, which torch casts to the parameter's dtype on loading."""
    return {k: v for k, v in tensors_of(optimizer).items() if not k.startswith("mu_product")}


@pytest.mark.parametrize(
    "flags", [{}, {"foreach": True}, {"fused": True}, {"capturable": True}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_checkpoint_of_torch_and_back(backend, case, dtype, flags):
    refused = flags.keys() - inspect.signature(case.twin).parameters.keys()
    if refused:
        pytest.skip(f"torch's {case.twin.__name__} has no {refused}")
    if "capturable" in flags and backend.device == "cpu":
        flags = {}  # torch refuses it here: only the states' device is of interest
    twins = make_params(SHAPES, dtype, backend.device)
    twin = case.twin(twins, **case.kwargs, **flags)
    train(twin, range(2))
    params = [p.detach().clone().requires_grad_() for p in twins]
    fused = backend.make(case.cls, params)
    fused.load_state_dict(copy.deepcopy(twin.state_dict()))
    assert_same_bits(tensors_kept_by_torch(fused), tensors_kept_by_torch(twin))
    train(fused, [2])
    train(twin, [2])
    if dtype == torch.float32:  # of 16 bits, torch rounds every operation
        torch.testing.assert_close(tensors_of(fused), tensors_of(twin), rtol=1e-3, atol=1e-5)

    back = case.twin([p.detach().clone().requires_grad_() for p in params])
    back.load_state_dict(fused.state_dict())
    assert_same_bits(tensors_kept_by_torch(back), tensors_kept_by_torch(fused))
    assert back.state_dict().keys() == fused.state_dict().keys() == twin.state_dict().keys()
    assert fused.param_groups[0].keys() == twin.param_groups[0].keys()
    train(back, [3])


@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_old_checkpoint_with_the_step_as_a_number(backend, case):
    params = make_params(SHAPES, device=backend.device)
    optimizer = backend.make(case.cls, params)
    train(optimizer, range(3))
    checkpoint = copy.deepcopy(optimizer.state_dict())
    for state in checkpoint["state"].values():
        for key, value in state.items():
            if value.dim() == 0:
                state[key] = value.item()
    others = [p.detach().clone().requires_grad_() for p in params]
    again = backend.make(case.cls, others)
    again.load_state_dict(checkpoint)
    train(optimizer, [3])
    train(again, [3])
    assert_same_bits(tensors_of(again), tensors_of(optimizer))


def test_checkpoint_loaded_in_mid_training(backend):
    params = make_params(SHAPES, device=backend.device)
    optimizer = backend.make(fusedopt.FusedAdam, params, max_grad_norm=1.0)
    train(optimizer, range(2))
    checkpoint = copy.deepcopy(optimizer.state_dict())
    values = [p.detach().clone() for p in params]
    train(optimizer, [2, 3])
    expected = {name: value.clone() for name, value in tensors_of(optimizer).items()}
    with torch.no_grad():
        for p, value in zip(params, values):
            p.copy_(value)
    optimizer.load_state_dict(checkpoint)
    assert optimizer.max_grad_norm == 1.0
    train(optimizer, [2, 3])
    assert_same_bits(tensors_of(optimizer), expected)


def test_users_keys_survive_steps_and_checkpoints(backend):
    params = make_params(SHAPES, device=backend.device)
    optimizer = backend.make(fusedopt.FusedAdam, params)
    train(optimizer, [0])
    optimizer.state[params[0]]["extra"] = {"a": 1}
    optimizer.state[params[1]][3] = torch.ones(2)
    train(optimizer, [1])
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(optimizer, [2])
    assert optimizer.state[params[0]]["extra"] == {"a": 1}
    assert torch.equal(optimizer.state[params[1]][3].cpu(), torch.ones(2))


def continues_equally(original, other, params, other_params):
    for seed in (11, 12):
        set_grads(params, seed)
        set_grads(other_params, seed)
        original.step()
        other.step()
    assert_same_bits(tensors_of(original), tensors_of(other))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_copy_keeps_all_and_goes_on_alike(backend, case, copied):
    params = make_params(SHAPES, device=backend.device)
    original = backend.make(case.cls, params, max_grad_norm=0.5, nonfinite="skip", **case.kwargs)
    set_grads(params, 0)
    original.step()
    params[0].grad[3] = float("nan")
    original.step()
    again = copied(original)
    assert (again.max_grad_norm, again.nonfinite) == (0.5, "skip")
    assert again._backend == original._backend
    assert again.skipped_steps == 1 and again.step_skipped
    others = again.param_groups[0]["params"]
    assert others[0] is not params[0]
    continues_equally(original, again, params, others)
    with pytest.raises(ValueError, match="max_grad_norm"):
        again.max_grad_norm = -1


def test_copy_before_the_first_step(backend):
    params = make_params(SHAPES, device=backend.device)
    original = backend.make(fusedopt.FusedAdam, params, nonfinite="raise")
    again = copy.deepcopy(original)
    continues_equally(original, again, params, again.param_groups[0]["params"])
