"""Checkpoints of dealt states: other numbers of ranks, from and to optimizers without a deal."""

import copy
import warnings

import over_ranks
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from cases import assert_same_bits, same_bits, set_grads, tensors_of
from test_shard_states import of_share
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import fusedopt
from fusedopt.clip import PerTensor, ZScore

CLASSES = {
    "AdamW": (fusedopt.FusedAdamW, {"lr": 0.1, "max_grad_norm": ZScore(warmup=2)}),
    "SGD": (fusedopt.FusedSGD, {"lr": 0.1, "momentum": 0.9, "max_grad_norm": PerTensor(warmup=1)}),
    "RMSprop": (fusedopt.FusedRMSprop, {"lr": 0.1, "max_grad_norm": 1.0}),
}
# How many ranks share the states; 0: an optimizer without a deal.
WORLDS = (2, 4, 0, 1, 2)
NOT_STRICT = StateDictOptions(strict=False)  # the states of others are missing


def make_model():
    torch.manual_seed(0)
    layers = [torch.nn.Linear(5, 30), torch.nn.Linear(30, 4, bias=False), torch.nn.LayerNorm(4)]
    return torch.nn.Sequential(*layers)


def make(name, sharded=True):
    cls, options = CLASSES[name]
    model = make_model()
    opt = cls(model.parameters(), **options)
    return model, fusedopt.shard_states(opt) if sharded else opt


def step(model, opt, number):
    set_grads(list(model.parameters()), number)
    opt.step()


def undisturbed(name, steps):
    model, opt = make(name, sharded=False)
    for number in range(steps):
        step(model, opt, number)
    return opt


def assert_equal(opt, other):
    assert_same_bits(tensors_of(opt), of_share(opt, tensors_of(other)))
    learned = opt._own["clip_state"]
    assert learned is None or same_bits(learned, other._own["clip_state"])


def by_torch(stage, folder, name, model, opt):
    """torch.distributed.checkpoint: each rank saves and loads its own states."""
    if stage > 0:
        state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, opt)}
        dcp.load(state, checkpoint_id=f"{folder}/{name}{stage - 1}")
        model.load_state_dict(state["model"])
        set_optimizer_state_dict(model, opt, state["optimizer"], options=NOT_STRICT)
    step(model, opt, stage)
    state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, opt)}
    dcp.save(state, checkpoint_id=f"{folder}/{name}{stage}")


def by_file(stage, folder, name, model, opt):
    """One file, which rank 0 writes."""
    if stage > 0:
        saved = torch.load(f"{folder}/{name}{stage - 1}.pt", weights_only=True)
        model.load_state_dict(saved["model"])
        opt.load_state_dict(saved["optimizer"])
        assert opt._steps_taken() == (stage if opt.rule.counter == "step" else 0)
    step(model, opt, stage)
    saved = {"model": model.state_dict(), "optimizer": fusedopt.consolidated_state_dict(opt)}
    if dist.get_rank() == 0:
        torch.save(saved, f"{folder}/{name}{stage}.pt")
    else:
        assert not saved["optimizer"] or opt._own["share"] is None
    dist.barrier()


def one_world(rank, stage, folder):
    warnings.simplefilter("ignore")  # of torch.distributed.checkpoint
    for name in CLASSES:
        for way in (by_torch, by_file):
            model, opt = make(name, sharded=WORLDS[stage] > 0)
            way(stage, folder, name, model, opt)
            assert_equal(opt, undisturbed(name, stage + 1))


def test_a_checkpoint_fits_any_number_of_ranks(tmp_path):
    for stage, world in enumerate(WORLDS):
        over_ranks.run(one_world, max(world, 1), stage, str(tmp_path))


def one_ranks_share(rank):
    """It loads on the same rank of as many, and nowhere else."""
    model, opt = make("AdamW")
    step(model, opt, 0)
    saved = copy.deepcopy(opt.state_dict())
    assert saved["share"]["rank"] == rank
    again_model, again = make("AdamW")
    again_model.load_state_dict(model.state_dict())
    again.load_state_dict(saved)
    step(again_model, again, 1)
    assert_equal(again, undisturbed("AdamW", 2))
    saved["share"] = {**saved["share"], "rank": 1 - rank}
    for other in (opt, make("AdamW", sharded=False)[1]):
        before = copy.deepcopy(tensors_of(other))
        with pytest.raises(ValueError, match=f"share of rank {1 - rank} of 2, and lacks"):
            other.load_state_dict(saved)
        assert_same_bits(tensors_of(other), before)


def whole_is_equal(rank):
    """The consolidated checkpoint is that of an unsharded optimizer, and loads into torch's."""
    for name in CLASSES:
        model, opt = make(name)
        step(model, opt, 0)
        saved = fusedopt.consolidated_state_dict(opt, to=1)
        if rank == 0:
            assert saved == {}
            continue
        expected = undisturbed(name, 1).state_dict()
        assert repr(saved) == repr(expected)
        twin = getattr(torch.optim, name)(make_model().parameters(), lr=0.1)
        twin.load_state_dict(saved)
        assert all(state.keys() == expected["state"][0].keys() for state in twin.state.values())


def a_wrong_state_is_refused_by_all(rank):
    _, opt = make("AdamW")
    saved = copy.deepcopy(undisturbed("AdamW", 1).state_dict())
    saved["state"][0]["exp_avg"] = torch.zeros(7)
    with pytest.raises(RuntimeError, match="'exp_avg' of parameter 0"):
        opt.load_state_dict(saved)
    assert not opt.state


def two_ranks(rank):
    for body in (one_ranks_share, whole_is_equal, a_wrong_state_is_refused_by_all):
        body(rank)


def test_a_share_and_the_whole():
    over_ranks.run(two_ranks, 2)
