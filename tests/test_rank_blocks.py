"""Parts of sharded tensors are rounded as the whole is, by the index in the whole: 8 bits, too."""

import warnings
from functools import partial

import over_ranks
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from cases import same_bits
from rank_tensors import full, placed, placed_like
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

import fusedopt
from fusedopt.distributed import PeerError

# A shard begins at 24,960, within elements that share a key of random bits. One is short, and one
# empty.
SHAPES = [(12, 4160), (256,), (3, 64), (1, 64), (8, 64, 2)]
WHOLE = [(5,), ()]  # replicated: a shard would cut their only block
CASES = [
    (fusedopt.FusedAdamW, {"master_weights": "24bit", "state_dtype": "8bit"}),
    (fusedopt.FusedAdamW, {"state_dtype": "8bit", "rounding": "stochastic", "seed": 3}),
    (fusedopt.FusedAdamW, {"state_dtype": torch.bfloat16}),
    (fusedopt.FusedSGD, {"momentum": 0.9, "state_dtype": "8bit", "rounding": "stochastic"}),
    (fusedopt.FusedRMSprop, {"state_dtype": "8bit", "backend": "reference"}),
]


def values(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(it, generator=generator).bfloat16() for it in (*SHAPES, *WHOLE)]


def make(mesh, placements):
    cuts = [placements] * len(SHAPES) + [[Replicate()] * mesh.ndim] * len(WHOLE)
    pairs = zip(values(0), cuts, strict=True)
    return [torch.nn.Parameter(placed(value, mesh, it)) for value, it in pairs]


def step(optimizer, params, seed):
    for param, grad in zip(params, values(seed), strict=True):
        param.grad = placed_like(param, grad)
    optimizer.step()


def check_equals_whole(mesh, placements, cls, options):
    params, whole = make(mesh, placements), [torch.nn.Parameter(it) for it in values(0)]
    ours, alone = (cls(its, lr=0.01, **options) for its in (params, whole))
    for seed in (1, 2, 3):
        for optimizer, its in ((ours, params), (alone, whole)):
            step(optimizer, its, seed)
    for i, (param, expected) in enumerate(zip(params, whole, strict=True)):
        assert same_bits(full(param), expected), (cls, options, i)
        assert ours.state[param].keys() == alone.state[expected].keys()
        for key, value in alone.state[expected].items():
            found = ours.state[param][key]
            assert isinstance(found, DTensor) == (key != "step")
            assert same_bits(full(found), value), (cls, options, i, key)


def split_tensors(rank):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for cls, options in CASES:
        check_equals_whole(mesh, [Shard(0)], cls, options)
    check_equals_whole(mesh, [Replicate()], *CASES[0])
    refused(mesh)
    converted(mesh)
    dealt(rank)


def refused(mesh):
    """By the constructor, a step, a load and init_state(), before anything is changed."""
    for shape, cut, message in [
        ((10, 20), Shard(0), r"has the elements 0 to 100 of 200|has the elements 100 to 200"),
        ((5, 192), Shard(0), "of as many whole blocks on every rank"),
        ((4, 128), Shard(1), "cut along its first dimension only"),
        ((64, 4), Shard(1), "cut along its first dimension only"),
    ]:
        param = torch.nn.Parameter(placed(torch.ones(shape), mesh, [cut]))
        param.grad = placed_like(param, torch.ones(shape))
        with pytest.raises(ValueError, match=message):
            fusedopt.FusedAdamW([param], state_dtype="8bit")
        optimizer = fusedopt.FusedAdamW([param])
        optimizer.step()
        saved, before = optimizer.state_dict(), full(param).clone()
        optimizer = fusedopt.FusedAdamW([param])
        optimizer.param_groups[0]["state_dtype"] = "8bit"
        calls = (optimizer.step, optimizer.init_state, partial(optimizer.load_state_dict, saved))
        for call in calls:
            with pytest.raises((ValueError, PeerError), match=message):
                call()
        assert torch.equal(full(param), before) and not optimizer.state


def converted(mesh):
    """From float32 to 8 bits and back, on load, as the whole is."""
    params, whole = make(mesh, [Shard(0)]), [torch.nn.Parameter(it) for it in values(0)]
    wide = {"state_dtype": torch.float32}
    found = []
    for its in (params, whole):
        optimizer = fusedopt.FusedAdamW(its, **wide)
        step(optimizer, its, 1)
        for options in ({"state_dtype": "8bit"}, wide):
            saved = optimizer.state_dict()
            optimizer = fusedopt.FusedAdamW(its, **options)
            optimizer.load_state_dict(saved)
            found.append([{k: full(v) for k, v in optimizer.state[it].items()} for it in its])
    for ours, alone in ((found[0], found[2]), (found[1], found[3])):
        for state, expected in zip(ours, alone, strict=True):
            assert state.keys() == expected.keys()
            assert all(same_bits(state[key], expected[key]) for key in state)


def dealt(rank):
    """Whole parameters by `shard_states`; consolidated, the state is that of one process."""
    cls, options = CASES[0]
    params, whole = ([torch.nn.Parameter(it) for it in values(0)] for _ in range(2))
    ours, alone = fusedopt.shard_states(cls(params, **options)), cls(whole, **options)
    for seed in (1, 2, 3):
        for optimizer, its in ((ours, params), (alone, whole)):
            step(optimizer, its, seed)
    assert all(same_bits(param, it) for param, it in zip(params, whole, strict=True))
    saved, expected = fusedopt.consolidated_state_dict(ours), alone.state_dict()["state"]
    assert rank > 0 or saved["state"].keys() == expected.keys()
    for index, state in saved.get("state", {}).items():
        assert state.keys() == expected[index].keys()
        assert all(same_bits(state[key], expected[index][key]) for key in state)
    again = fusedopt.shard_states(cls([torch.nn.Parameter(it) for it in values(0)], **options))
    found = [None]
    dist.broadcast_object_list(found if rank > 0 else (found := [saved]), 0)
    again.load_state_dict(found[0])
    kept = [it for it in again.state_dict()["state"].values()]
    assert 0 < len(kept) < len(params)


def test_a_split_tensor_equals_the_whole_by_the_index_in_it():
    over_ranks.run(split_tensors, 2)


def two_dimensions(rank):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    check_equals_whole(mesh, [Replicate(), Shard(0)], *CASES[0])


def test_shards_with_replicas():
    over_ranks.run(two_dimensions, 4)


# --- checkpoints


def sharded_model():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Linear(256, 4, bias=False))
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model


def model_step(model, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        param.grad = placed_like(param, torch.randn(param.shape, generator=generator))
    optimizer.step()


def one_world(rank, stage, folder):
    """Loads what the world before has saved, takes a step, and saves."""
    warnings.simplefilter("ignore")
    model = sharded_model()
    optimizer = fusedopt.FusedAdamW(model.parameters(), lr=0.1, state_dtype="8bit")
    if stage > 0:
        optimizer.init_state()
        state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
        dcp.load(state, checkpoint_id=f"{folder}/{stage - 1}")
        set_state_dict(
            model,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
    model_step(model, optimizer, stage)
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
    dcp.save(state, checkpoint_id=f"{folder}/{stage}")
    alone = sharded_model()
    other = fusedopt.FusedAdamW(alone.parameters(), lr=0.1, state_dtype="8bit")
    for seed in range(stage + 1):
        model_step(alone, other, seed)
    for param, expected in zip(model.parameters(), alone.parameters(), strict=True):
        assert same_bits(full(param), full(expected))
        for key, value in other.state[expected].items():
            assert same_bits(full(optimizer.state[param][key]), full(value)), key


def test_codes_and_scales_are_dealt_anew(tmp_path):
    for stage, world in enumerate((2, 1)):
        over_ranks.run(one_world, world, stage, str(tmp_path))
