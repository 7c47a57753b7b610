"""Clipping by itself over several ranks: the norm of an optimizer's own step, to the bit."""

import math

import over_ranks
import pytest
import torch
import torch.distributed as dist
from rank_tensors import (
    counted_all_reduces,
    full,
    placed,
    same_on_all,
    set_grads,
    sharded,
    tensors,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import fusedopt

NORM_TYPES = [2.0, math.inf, 1.0]


def mixed(mesh):
    """Sharded over both dimensions of a mesh, over one of them, and plain."""
    values = tensors(0)
    params = [
        torch.nn.Parameter(placed(values[0], mesh, [Shard(0), Replicate()])),
        torch.nn.Parameter(placed(values[1], mesh["shard"], [Shard(0)])),
        torch.nn.Parameter(values[2]),
        torch.nn.Parameter(placed(values[3], mesh, [Shard(0), Shard(0)])),
        torch.nn.Parameter(placed(values[4], mesh, [Replicate(), Shard(1)])),
    ]
    set_grads(params, 1)
    return params


def plain(scale=1.0):
    params = [torch.nn.Parameter(value) for value in tensors(0)]
    set_grads(params, 1, scale)
    return params


def mixed_meshes(rank):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for backend in (None, "reference"):
        for norm_type in NORM_TYPES:
            params, expected = mixed(mesh), plain()
            with counted_all_reduces() as calls:
                norm = fusedopt.clip_grad_norm_(params, 0.5, norm_type, backend=backend)
            assert len(calls) == 1
            assert type(norm) is torch.Tensor
            assert same_on_all(norm.item())
            torch.testing.assert_close(norm, fusedopt.clip_grad_norm_(expected, 0.5, norm_type))
            for a, b in zip(params, expected, strict=True):
                assert isinstance(a.grad, DTensor) == isinstance(a, DTensor)
                torch.testing.assert_close(full(a.grad), b.grad)
    grads = [param.grad for param in mixed(mesh)]
    total = fusedopt.get_total_norm(grads)
    opt = fusedopt.FusedSGD(mixed(mesh), lr=0.1, max_grad_norm=1.0)
    opt.step()
    assert total.item() == opt.grad_norm.item()
    known_norm(mesh)


def known_norm(mesh):
    params, expected = sharded(mesh, [Shard(0), Replicate()]), plain()
    set_grads(params, 1)
    total = torch.nn.utils.get_total_norm([param.grad for param in params])
    assert isinstance(total, DTensor)
    fusedopt.clip_grads_with_norm_(params, 0.5, total)
    fusedopt.clip_grads_with_norm_(expected, 0.5, total.full_tensor())
    for a, b in zip(params, expected, strict=True):
        torch.testing.assert_close(full(a.grad), b.grad)


def test_mixed_meshes_and_plain_tensors_have_one_norm():
    over_ranks.run(mixed_meshes, 4)


def dealt(rank):
    """Whole tensors, each on one rank; only rank 0 has a float64 one. Rank 1 also without any."""
    options = {"process_group": dist.group.WORLD, "plain": "own"}
    grads = [grad.double() if i == 0 else grad for i, grad in enumerate(tensors(1))]
    mine = [grad.clone() for i, grad in enumerate(grads) if i % 2 == rank]
    squares = [fusedopt.reference.norms.chunk_sums(grad, grad) for grad in grads]
    expected = math.sqrt(math.fsum(torch.cat(squares).tolist()))
    norm = fusedopt.get_total_norm(mine, **options)
    assert norm.dtype == torch.float64
    assert norm.item() == expected
    listed_twice = [*mine, mine[0]]
    doubled = fusedopt.get_total_norm(listed_twice, **options).item()
    alone = fusedopt.get_total_norm([*grads, grads[0], grads[1]]).item()
    assert math.isclose(doubled, alone, rel_tol=1e-6)
    params = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in mine]
    for param, grad in zip(params, mine, strict=True):
        param.grad = grad if rank == 0 else None
    norm = fusedopt.clip_grad_norm_(params, 0.1, **options)
    assert same_on_all(norm.item())
    squares = [it for i, it in enumerate(squares) if i % 2 == 0]
    assert norm.item() == math.sqrt(math.fsum(torch.cat(squares).tolist()))


def partial(rank):
    """A gradient that is yet to be added up over the ranks."""
    mesh = init_device_mesh("cpu", (2,))
    part = torch.arange(4.0) + rank
    param = torch.nn.Parameter(placed(torch.zeros(4), mesh, [Replicate()]))
    param.grad = DTensor.from_local(part.clone(), mesh, [Partial()])
    total = 2 * torch.arange(4.0) + 1
    torch.testing.assert_close(fusedopt.get_total_norm([param.grad]), total.norm())
    torch.testing.assert_close(fusedopt.clip_grad_norm_([param], 1.0), total.norm())
    torch.testing.assert_close(full(param.grad), total / total.norm())
    assert param.grad.placements == (Partial(),)


def refusals(rank):
    mesh = init_device_mesh("cpu", (2,))
    for culprit in range(2):
        params = sharded(mesh, [Shard(0)])
        set_grads(params, 1)
        before = [param.grad._local_tensor.clone() for param in params]
        if rank == culprit:
            params[0].grad._local_tensor = before[0].int()
            with pytest.raises(TypeError, match=r"the gradient of parameter 0 is torch.int32"):
                fusedopt.clip_grad_norm_(params, 0.1)
        else:
            with pytest.raises(fusedopt.PeerError, match=f"rank {culprit} refused.*int32") as error:
                fusedopt.clip_grad_norm_(params, 0.1)
            assert error.value.ranks == [culprit]
            assert all(map(torch.equal, before, (param.grad._local_tensor for param in params)))
        set_grads(params, 1)
        if rank == culprit:
            params[0].grad._local_tensor[0] = math.nan
        with pytest.raises(RuntimeError, match="non-finite"):
            fusedopt.clip_grad_norm_(params, 0.1, error_if_nonfinite=True)
        assert math.isnan(fusedopt.get_total_norm([param.grad for param in params]))
    with pytest.raises(fusedopt.PeerError, match=r"rank 0 has max_norm=1.*rank 1 has max"):
        fusedopt.clip_grad_norm_(params, 1.0 + rank)


def all_on_two_ranks(rank):
    for body in (dealt, partial, refusals):
        body(rank)


def test_two_ranks():
    over_ranks.run(all_on_two_ranks, 2)
