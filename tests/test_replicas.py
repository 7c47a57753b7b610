"""Ranks that should hold the same gradients compare them: who has others is found and named."""

import over_ranks
import pytest
import torch
import torch.distributed as dist
from rank_tensors import on_all, placed, set_grads, tensors
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel

import fusedopt
from fusedopt import ReplicasDifferError


def nudge(tensor):
    local = getattr(tensor, "_local_tensor", tensor).reshape(-1)
    local[0] = torch.nextafter(local[0], torch.tensor(100.0))


def forgotten_no_sync(rank):
    """DDP, without any other argument. The third backward pass is not reduced."""
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Linear(5, 3))
    opt = fusedopt.FusedAdamW(model.named_parameters(), check_replicas=1)
    for step in range(3):
        inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(10 * step + rank))
        opt.zero_grad()
        model.require_backward_grad_sync = step < 2
        model(inputs).square().sum().backward()
        before = [param.detach().clone() for param in model.parameters()]
        if step < 2:
            opt.step()
            continue
        with pytest.raises(ReplicasDifferError, match=r"module.weight, module.bias are") as error:
            opt.step()
        assert error.value.names == ["module.weight", "module.bias"]
        assert error.value.ranks == list(range(1, dist.get_world_size()))
        assert all(map(torch.equal, before, model.parameters()))


def mesh_of_copies(rank):
    """HSDP, and plain tensors beside: each replica in turn is an ulp off, every second step."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    values = tensors(0)
    params = [torch.nn.Parameter(placed(it, mesh, [Replicate(), Shard(0)])) for it in values]
    params[1] = torch.nn.Parameter(values[1])
    params[2] = torch.nn.Parameter(placed(values[2], mesh["shard"], [Shard(0)]))
    opt = fusedopt.FusedAdamW(params, max_grad_norm=1.0, check_replicas=2)
    for culprit, index in ((3, 4), (2, 1), (3, 2)):
        set_grads(params, 1)
        opt.step()
        if rank == culprit:
            nudge(params[index].grad)
        with pytest.raises(ReplicasDifferError) as error:
            opt.step()
        assert error.value.ranks == [culprit]
        assert error.value.names == [f"parameter {index} of param group 0"]
        found = on_all(str(error.value))
        assert all(it == found[0] for it in found)
    set_grads(params, 1)
    for _ in range(4):
        opt.step()


def what_is_no_copy(rank):
    """Each rank's own tensors, parts of a tensor, and what is yet to be added up."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    own = torch.nn.Parameter(torch.zeros(4))
    own.grad = torch.full((4,), float(rank))
    part = torch.nn.Parameter(placed(torch.zeros(8), mesh, [Shard(0)]))
    part.grad = placed(torch.arange(8.0), mesh, [Shard(0)])
    summed = torch.nn.Parameter(placed(torch.zeros(4), mesh, [Replicate()]))
    summed.grad = type(summed.grad or part.grad).from_local(own.grad.clone(), mesh, [Partial()])
    options = {"process_group": dist.group.WORLD, "plain": "own", "check_replicas": 1}
    opt = fusedopt.FusedSGD([own, part, summed], lr=0.1, **options)
    opt.step()
    summed.grad = placed(torch.ones(4), mesh, [Replicate()])
    if rank == 1:
        summed.grad = None
    with pytest.raises(ReplicasDifferError, match="parameter 2 of param group 0"):
        opt.step()


def what_the_step_refuses(rank):
    """A gradient that can't be read is for the step to name."""
    params = [torch.nn.Parameter(torch.zeros(4)) for _ in range(2)]
    for param in params:
        param.grad = torch.ones(4)
    params[0].grad = params[0].grad.to_sparse()
    opt = fusedopt.FusedSGD(params, lr=0.1, check_replicas=1)
    with pytest.raises(RuntimeError, match=r"parameter 0 .* is sparse"):
        opt.step()


def copies(rank):
    for body in (forgotten_no_sync, mesh_of_copies, what_is_no_copy, what_the_step_refuses):
        body(rank)


def test_copies_that_differ_are_found_and_named():
    over_ranks.run(copies, 4)


def test_alone_there_is_nothing_to_compare():
    param = torch.nn.Parameter(torch.zeros(3))
    param.grad = torch.ones(3)
    opt = fusedopt.FusedAdamW([param], check_replicas=1)
    opt.step()
    assert opt._steps_taken() == 1
    for value in (0, 1.5, "2"):
        with pytest.raises((TypeError, ValueError), match="check_replicas"):
            fusedopt.FusedAdamW([param], check_replicas=value)
