"""Scalers over several meshes: each rank may see other infs, and yet all skip the same steps."""

import math

import over_ranks
import torch
from rank_tensors import on_all, placed, same_on_all, set_grads, sharded, tensors
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import fusedopt


def mixed(mesh, scaler_class):
    """The first lies on a part of the mesh only, which is what torch's scaler asks.

    torch's scaler takes no plain tensors beside DTensors.
    """
    values = tensors(0)
    params = sharded(mesh, [Replicate(), Shard(0)])
    params[0] = torch.nn.Parameter(placed(values[0], mesh["shard"], [Shard(0)]))
    if scaler_class is fusedopt.GradScaler:
        params[2] = torch.nn.Parameter(values[2])
    return params


def locals_of(params):
    return [it._local_tensor if isinstance(it, DTensor) else it.detach() for it in params]


def on_four_ranks(rank):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for scaler_class in (fusedopt.GradScaler, torch.amp.GradScaler):
        for culprit in (None, 0, 3):
            for index in (0, 4):
                one_step(rank, mesh, scaler_class, culprit, index)
    without_gradients(rank, mesh)


def one_step(rank, mesh, scaler_class, culprit, index):
    params = mixed(mesh, scaler_class)
    opt = fusedopt.FusedAdamW(params, max_grad_norm=1.0)
    scaler = scaler_class("cpu", init_scale=8.0)
    scaler.scale(torch.tensor(1.0))
    set_grads(params, 1, scale=8.0)
    if rank == culprit:
        params[index].grad._local_tensor[0] = math.inf
    before = [it.clone() for it in locals_of(params)]
    scaler.step(opt)
    scaler.update()
    assert opt._steps_taken() == 1
    assert bool(opt.step_skipped) == (culprit is not None)
    assert all(map(torch.equal, before, locals_of(params))) == (culprit is not None)
    if culprit is None:
        assert same_on_all(opt.grad_norm.item())
    if scaler_class is fusedopt.GradScaler:  # torch's own lowers the scale of some ranks alone
        expected = 8.0 if culprit is None else 4.0
        assert on_all(scaler.get_scale()) == [expected] * 4


def without_gradients(rank, mesh):
    """A rank that has none joins, with our scaler."""
    params = [torch.nn.Parameter(placed(tensors(0)[4], mesh, [Replicate(), Shard(0)]))]
    opt = fusedopt.FusedAdamW(params, max_grad_norm=1.0)
    scaler = fusedopt.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.tensor(1.0))
    if rank > 1:
        params[0].grad = placed(tensors(1)[4] * 8, mesh, params[0].placements)
    scaler.step(opt)
    scaler.update()
    assert on_all(opt._steps_taken()) == [1] * 4


def test_all_ranks_skip_the_same_steps():
    over_ranks.run(on_four_ranks, 4)
