"""A rank that can't step says so: nobody hangs, nothing changes, and errors name the rank."""

import math

import over_ranks
import pytest
import torch
import torch.distributed as dist
from cases import FusedCautiousAdamW, FusedCautiousLion
from rank_tensors import counted_all_reduces, on_all, placed, set_grads, sharded, tensors
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import fusedopt
from fusedopt.clip import PerTensor, Unit


def refused_by(culprit, rank, step, error, match):
    """One rank's own error, which the others hear of."""
    with pytest.raises(error if rank == culprit else fusedopt.PeerError, match=match) as raised:
        step()
    if rank != culprit:
        assert raised.value.ranks == [culprit]


def malformed_flag(rank, culprit):
    params = sharded(init_device_mesh("cpu", (2,)), [Shard(0)])
    opt = fusedopt.FusedAdamW(params, max_grad_norm=1.0)
    set_grads(params, 1)
    opt._own["found_inf"] = torch.zeros(2) if rank == culprit else None
    before = [param._local_tensor.clone() for param in params]
    refused_by(culprit, rank, opt.step, RuntimeError, "2 elements")
    assert all(map(torch.equal, before, (param._local_tensor for param in params)))
    opt.found_inf = None
    opt.step()


def before_redistribution(rank, culprit):
    """The others are about to add up `Partial` gradients, which needs all ranks."""
    mesh = init_device_mesh("cpu", (2,))
    params = [torch.nn.Parameter(placed(torch.zeros(4), mesh, [Replicate()])) for _ in range(2)]
    opt = fusedopt.FusedSGD(params, lr=1.0, max_grad_norm=math.inf)
    for param in params:
        param.grad = DTensor.from_local(torch.ones(4), mesh, [Partial()])
    fine = params[0].grad
    if rank == culprit:
        params[0]._grad = None
        params[0].grad = placed(torch.ones(4), mesh, [Replicate()])
        params[0].grad._local_tensor = torch.ones(4, dtype=torch.int32)
    refused_by(culprit, rank, lambda: fusedopt.clip_grad_norm_(params, 1.0), TypeError, "int32")
    params[0].grad = fine
    opt.step()
    assert all(torch.equal(param.full_tensor(), torch.full((4,), -2.0)) for param in params)


def meshes_without_a_root(rank):
    """All ranks refuse, and none of them waits."""
    meshes = [init_device_mesh("cpu", (2,), mesh_dim_names=(name,)) for name in "ab"]
    params = [torch.nn.Parameter(placed(torch.zeros(4), mesh, [Shard(0)])) for mesh in meshes]
    opt = fusedopt.FusedSGD(params, max_grad_norm=1.0)
    for call in (opt.step, lambda: fusedopt.clip_grad_norm_(params, 1.0)):
        with pytest.raises(ValueError, match="without a common root"):
            call()
    opt = fusedopt.FusedSGD(params, max_grad_norm=1.0, process_group=dist.group.WORLD)
    opt.step()


def settings_differ(rank):
    params = [torch.nn.Parameter(torch.zeros(2))]
    params[0].grad = torch.ones(2)
    plain = ("own", "replicated")[rank]
    opt = fusedopt.FusedSGD(params, process_group=dist.group.WORLD, plain=plain)
    match = r"rank 0 has .*plain='own'.*; rank 1 has .*plain='replicated'"
    with pytest.raises(fusedopt.PeerError, match=match):
        opt.step()


def broken_copy(rank, culprit):
    """nan in one rank's copy of what is replicated: all skip, whoever counts that gradient."""
    mesh = init_device_mesh("cpu", (2,))
    params = [
        torch.nn.Parameter(placed(torch.zeros(4), mesh, [Shard(0)])),
        torch.nn.Parameter(placed(torch.zeros(4), mesh, [Replicate()])),
        torch.nn.Parameter(torch.zeros(4)),
    ]
    for broken in params[1:]:
        opt = fusedopt.FusedSGD(params, max_grad_norm=1.0)
        for param in params:
            param.grad = torch.ones_like(param)
        if rank == culprit:
            local = broken.grad
            (local._local_tensor if isinstance(local, DTensor) else local)[0] = math.nan
        opt.step()
        assert bool(opt.step_skipped)


def replicated_alone(rank):
    """A group of ranks that turn out to have only copies: they need no message any more."""
    params = [torch.nn.Parameter(value) for value in tensors(0)]
    set_grads(params, 1)
    opt = fusedopt.FusedAdamW(params, max_grad_norm=1.0, process_group=dist.group.WORLD)
    for expected in (1, 0, 0):
        with counted_all_reduces() as calls:
            opt.step()
        assert len(calls) == expected
    sums = [param.detach().double().sum().item() for param in params]
    assert all(it == sums for it in on_all(sums))


def without_the_sharded_one(rank):
    """Rank 1 has no expert: it has only copies, and joins all the same."""
    params = [torch.nn.Parameter(torch.zeros(4))]
    if rank == 0:
        alone = init_device_mesh("cpu", (2,))
        params.append(torch.nn.Parameter(placed(torch.zeros(4), alone, [Shard(0)])))
    else:
        init_device_mesh("cpu", (2,))
    for param in params:
        param.grad = torch.ones_like(param)
    opt = fusedopt.FusedSGD(params, max_grad_norm=1.0, process_group=dist.group.WORLD)
    for _ in range(3):
        opt.step()
        assert opt.grad_norm.item() == pytest.approx(math.sqrt(4 + 2))


def parts_have_no_norm(rank):
    """Limits of tensors and rows, for what each rank has only a part of."""
    for use_orig_params in (False, True):
        model = torch.nn.Sequential(torch.nn.Linear(5, 3))
        model = FSDP(model, use_orig_params=use_orig_params, device_id=torch.device("cpu"))
        options = {"process_group": dist.group.WORLD, "plain": "own"}
        for limit in (PerTensor(), Unit()):
            with pytest.raises(ValueError, match="each rank has a part only"):
                fusedopt.FusedAdamW(model.parameters(), max_grad_norm=limit, **options)
    params = sharded(init_device_mesh("cpu", (2,)), [Shard(0)])
    set_grads(params, 1)
    opt = fusedopt.FusedAdamW(params, max_grad_norm=1.0)
    opt.step()
    opt.max_grad_norm = PerTensor()
    with pytest.raises(ValueError, match="each rank has a part only"):
        opt.step()


def parts_have_no_trust_ratio(rank):
    """Of replicated tensors each rank has the norm."""
    mesh = init_device_mesh("cpu", (2,))
    cautious = (FusedCautiousAdamW, FusedCautiousLion)
    for cls in (fusedopt.FusedLAMB, fusedopt.FusedLARS, fusedopt.FusedStableAdamW, *cautious):
        with pytest.raises(ValueError, match=f"{cls.__name__} .* needs a sum over .*a part only"):
            cls(sharded(mesh, [Shard(0)]))
        flat = FSDP(torch.nn.Linear(5, 3), device_id=torch.device("cpu"))
        with pytest.raises(ValueError, match=f"{cls.__name__} .* needs a sum over .*a part only"):
            cls(flat.parameters(), process_group=dist.group.WORLD, plain="own")
        params, alone = sharded(mesh, [Replicate()]), list(map(torch.nn.Parameter, tensors(0)))
        for those in (params, alone):
            opt = cls(those, weight_decay=0.1)
            set_grads(those, 1)
            opt.step()
        assert all(torch.equal(p._local_tensor, q) for p, q in zip(params, alone, strict=True))


def refusals(rank):
    for culprit in range(2):
        for body in (malformed_flag, before_redistribution, broken_copy):
            body(rank, culprit)
    for body in (meshes_without_a_root, settings_differ, replicated_alone):
        body(rank)
    for body in (without_the_sharded_one, parts_have_no_norm, parts_have_no_trust_ratio):
        body(rank)


def test_two_ranks():
    over_ranks.run(refusals, 2)
