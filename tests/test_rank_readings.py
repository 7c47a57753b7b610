"""What is read of a step over ranks, and what limits learn from it, is the same on all ranks."""

import math

import over_ranks
import pytest
import torch
from rank_tensors import on_all, set_grads, sharded, tensors
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard

import fusedopt
from fusedopt.clip import Percentile, ZScore

SCALES = [1.0, 0.9, 1.1, 1.0, 50.0, 1.0, 0.8]


def assert_same_on_all(value):
    found = on_all(value)
    assert all(it == found[0] for it in found), found


def limits_learn_alike(rank):
    for limit in (Percentile(50, window=4, warmup=2), ZScore(warmup=2)):
        params = sharded(init_device_mesh("cpu", (2,)), [Shard(0)])
        plain = [torch.nn.Parameter(value) for value in tensors(0)]
        opt = fusedopt.FusedAdamW(params, max_grad_norm=limit, telemetry=8)
        alone = fusedopt.FusedAdamW(plain, max_grad_norm=limit, telemetry=8)
        for step, scale in enumerate(SCALES):
            for its in (params, plain):
                set_grads(its, step, scale)
            opt.step()
            alone.step()
        ours, expected = opt.telemetry(), alone.telemetry()
        assert bool((expected.clip_coef < 1).any())
        torch.testing.assert_close(ours.clip_coef, expected.clip_coef)
        torch.testing.assert_close(ours.grad_norm, expected.grad_norm)
        for column in (ours.grad_norm, ours.clip_coef, ours.skipped, ours.step, ours.lr):
            assert_same_on_all(column.tolist())
        assert_same_on_all(opt._own["clip_state"].tolist())


def what_was_learned_differs(rank):
    """A limit that only one rank has loaded would clip by another factor there."""
    params = sharded(init_device_mesh("cpu", (2,)), [Shard(0)])
    set_grads(params, 0)
    opt = fusedopt.FusedAdamW(params, max_grad_norm=ZScore(warmup=2))
    opt.step()
    if rank == 1:
        opt._own["clip_state"] = None
    match = r"rank 0 has .*learned from 1 steps.*; rank 1 has"
    with pytest.raises(fusedopt.PeerError, match=match):
        opt.step()


def skips_are_told_alike(rank, folder):
    params = sharded(init_device_mesh("cpu", (2,)), [Shard(0)])
    named = [(f"layer{i}", param) for i, param in enumerate(params)]
    opt = fusedopt.FusedAdamW(named, max_grad_norm=1.0, telemetry=4, max_consecutive_skips=2)
    with fusedopt.Monitor(opt, f"{folder}/{rank}.csv"):
        for step in range(3):
            set_grads(params, step)
            if rank == 0 and step > 0:
                params[0].grad._local_tensor[0] = math.nan
            if step < 2:
                opt.step()
            else:
                with pytest.raises(fusedopt.TooManySkipsError, match="2 steps in a row"):
                    opt.step()
            assert_same_on_all([bool(opt.step_skipped), int(opt.skipped_steps)])
    told = opt.explain()
    expected = ("layer0, 1 nan of 5", "gradients of another rank hold inf or nan")[rank]
    assert told.startswith(f"step 3 skipped: {expected}"), told
    log = fusedopt.read_log(f"{folder}/{rank}.csv").telemetry
    assert log.step.tolist() == [1, 2, 3]
    assert_same_on_all(log.skipped.tolist())
    assert_same_on_all(log.grad_norm[:1].tolist())


def a_restart_that_raises(rank):
    params = sharded(init_device_mesh("cpu", (2,)), [Shard(0)])
    opt = fusedopt.FusedSGD(params, nonfinite="raise", telemetry=2)
    for culprit in range(2):
        set_grads(params, 0)
        if rank == culprit:
            params[-1].grad._local_tensor[0, 0] = math.inf
        with pytest.raises(fusedopt.NonFiniteGradientError) as error:
            opt.step()
        assert_same_on_all(str(error.value))
        assert f"rank {culprit}: parameter 4" in str(error.value)


def everything(rank, folder):
    limits_learn_alike(rank)
    what_was_learned_differs(rank)
    skips_are_told_alike(rank, folder)
    a_restart_that_raises(rank)


def test_two_ranks(tmp_path):
    over_ranks.run(everything, 2, str(tmp_path))
