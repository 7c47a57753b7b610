"""Sharded checkpoints: another number of ranks, torch's optimizers, and before the first step."""

import copy
import warnings

import over_ranks
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from rank_tensors import full, placed_like, same_on_all
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import fully_shard

import fusedopt
from fusedopt.clip import ZScore

LIMIT = ZScore(warmup=50)
CLASSES = {
    "AdamW": (fusedopt.FusedAdamW, {"lr": 0.1, "weight_decay": 0.1}),
    "SGD": (fusedopt.FusedSGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    "RMSprop": (fusedopt.FusedRMSprop, {"lr": 0.1, "momentum": 0.9}),
}
WORLDS = (2, 4, 1, 2)


def make_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Linear(3, 4, bias=False))


def sharded_model():
    model = make_model()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def step(model, optimizer, number):
    """A step with gradients that are the same for every sharding."""
    generator = torch.Generator().manual_seed(number)
    for param in model.parameters():
        param.grad = placed_like(param, torch.randn(param.shape, generator=generator))
    optimizer.step()


def undisturbed(cls, options, steps):
    model = make_model()
    optimizer = cls(model.parameters(), **options)
    for number in range(steps):
        step(model, optimizer, number)
    return model, optimizer


def everything(model, optimizer):
    """Parameters and states, whole, by name."""
    found = {name: full(param).detach() for name, param in model.named_parameters()}
    for name, param in model.named_parameters():
        found |= {f"{name}/{key}": full(it) for key, it in optimizer.state[param].items()}
    return found


def assert_equal(found, expected, **tolerances):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **tolerances)


def load(model, optimizer, folder):
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )


def save(model, optimizer, folder):
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)


def one_world(rank, stage, folder):
    """Loads what the world before has saved, takes a step and saves."""
    warnings.simplefilter("ignore")
    for name, (cls, options) in CLASSES.items():
        model = sharded_model()
        optimizer = cls(model.parameters(), max_grad_norm=LIMIT, **options)
        if stage > 0:
            load(model, optimizer, f"{folder}/{name}{stage - 1}")
        step(model, optimizer, stage)
        save(model, optimizer, f"{folder}/{name}{stage}")
        alone, other = undisturbed(cls, {"max_grad_norm": LIMIT, **options}, stage + 1)
        assert_equal(everything(model, optimizer), everything(alone, other), rtol=0, atol=0)
        learned = optimizer._own["clip_state"]
        torch.testing.assert_close(learned, other._own["clip_state"])
        assert same_on_all(learned.tolist())
    with_torch(stage, folder)


def with_torch(stage, folder):
    """torch's AdamW and ours in turn."""
    model = sharded_model()
    cls = (torch.optim.AdamW, fusedopt.FusedAdamW)[stage % 2]
    optimizer = cls(model.parameters(), lr=0.1)
    if stage > 0:
        load(model, optimizer, f"{folder}/torch{stage - 1}")
    step(model, optimizer, stage)
    save(model, optimizer, f"{folder}/torch{stage}")
    expected = everything(*undisturbed(torch.optim.AdamW, {"lr": 0.1}, stage + 1))
    assert_equal(everything(model, optimizer), expected, rtol=1e-5, atol=1e-6)


def test_a_checkpoint_fits_any_number_of_ranks(tmp_path):
    for stage, world in enumerate(WORLDS):
        over_ranks.run(one_world, world, stage, str(tmp_path))


def before_the_first_step(rank, folder):
    """A save before step 1, by torch's functions or after init_state(), changes nothing."""
    for cls, options in [*CLASSES.values(), (fusedopt.FusedSGD, {"lr": 0.1})]:
        for calls_init in (False, True):
            model = sharded_model()
            optimizer = cls(model.parameters(), max_grad_norm=1e9, telemetry=3, **options)
            if calls_init:
                optimizer.init_state()
            saved = get_optimizer_state_dict(model, optimizer)
            has_state = "momentum" in options or cls is not fusedopt.FusedSGD
            assert len(saved["state"]) == (3 if has_state else 0)
            assert optimizer._steps_taken() == 0
            assert len(optimizer.telemetry().step) == 0
            for number in range(2):
                step(model, optimizer, number)
            expected = everything(*undisturbed(cls, options, 2))
            assert_equal(everything(model, optimizer), expected, rtol=0, atol=0)


def full_state(rank, folder):
    """Whole tensors on rank 0, broadcast from there."""
    for name, (cls, options) in CLASSES.items():
        model = sharded_model()
        optimizer = cls(model.parameters(), **options)
        step(model, optimizer, 0)
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        saved = get_optimizer_state_dict(model, optimizer, options=whole)
        assert bool(saved) == (rank == 0)
        expected = everything(model, optimizer)
        again = cls(model.parameters(), **options)
        again.init_state()  # torch's functions would, but for the gradients
        broadcast = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_optimizer_state_dict(model, again, copy.deepcopy(saved), options=broadcast)
        assert_equal(everything(model, again), expected, rtol=0, atol=0)
        if rank == 0 and name == "AdamW":
            alone = make_model()
            other = cls(alone.parameters(), **options)
            set_optimizer_state_dict(alone, other, saved, options=StateDictOptions())
            state = [it["exp_avg"] for it in other.state.values()]
            assert all(
                torch.equal(it, expected[f"{n}/exp_avg"])
                for it, (n, _) in zip(state, alone.named_parameters(), strict=True)
            )


def saved_meanwhile(rank, folder):
    """An asynchronous save, on a group of its own, has the state of its beginning."""
    model = sharded_model()
    optimizer = fusedopt.FusedAdamW(model.parameters(), lr=0.1, max_grad_norm=1.0)
    step(model, optimizer, 0)
    expected = everything(model, optimizer)
    group = dist.new_group(backend="gloo")
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    saving = dcp.async_save(state, checkpoint_id=f"{folder}/async", process_group=group)
    for number in range(1, 4):
        step(model, optimizer, number)
    saving.result()
    load(model, optimizer, f"{folder}/async")
    assert_equal(everything(model, optimizer), expected, rtol=0, atol=0)


def refused_layouts(rank, folder):
    model = sharded_model()
    optimizer = fusedopt.FusedAdamW(model.parameters(), lr=0.1)
    step(model, optimizer, 0)
    before = everything(model, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["exp_avg"] = saved["state"][0]["exp_avg"].full_tensor()
    with pytest.raises(ValueError, match=r"'exp_avg' of parameter 0 .* is a plain tensor"):
        optimizer.load_state_dict(saved)
    assert_equal(everything(model, optimizer), before, rtol=0, atol=0)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_equal(everything(model, optimizer), before, rtol=0, atol=0)


def older_fsdp(rank, folder):
    """FullyShardedDataParallel's own functions, both ways of use_orig_params."""
    for use_orig_params in (False, True):
        model, optimizer = fsdp_model(use_orig_params)
        model(torch.ones(2, 5)).square().sum().backward()
        optimizer.step()
        saved = FSDP.optim_state_dict(model, optimizer)
        model, again = fsdp_model(use_orig_params)
        loaded = FSDP.optim_state_dict_to_load(model, again, copy.deepcopy(saved))
        again.load_state_dict(loaded)
        found = FSDP.optim_state_dict(model, again)
        assert saved["state"].keys() == dict(make_model().named_parameters()).keys()
        for name, state in saved["state"].items():
            assert_equal(found["state"][name], state, rtol=0, atol=0)


def fsdp_model(use_orig_params):
    model = FSDP(make_model(), use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    options = {"process_group": dist.group.WORLD, "plain": "own"}
    return model, fusedopt.FusedAdamW(model.parameters(), 0.1, **options)


def on_two_ranks(rank, folder):
    warnings.simplefilter("ignore")
    for body in (before_the_first_step, full_state, saved_meanwhile, refused_layouts, older_fsdp):
        body(rank, folder)


def test_two_ranks(tmp_path):
    over_ranks.run(on_two_ranks, 2, str(tmp_path))
