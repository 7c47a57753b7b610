"""Sharded parameters: every rank has the same norm to the bit, and takes the same decision."""

import math

import over_ranks
import pytest
import torch
import torch.distributed as dist
from rank_tensors import counted_all_reduces, full, placed, same_on_all, set_grads, sharded, tensors
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import fusedopt

CLASSES = [fusedopt.FusedAdamW, fusedopt.FusedSGD, fusedopt.FusedRMSprop, fusedopt.FusedNAdam]


def check_equals_one_process(mesh, placements, cls, **options):
    """Some steps of sharded parameters, the third of which meets inf, against plain ones."""
    ours = sharded(mesh, placements)
    plain = [torch.nn.Parameter(value) for value in tensors(0)]
    opt = cls(ours, lr=0.1, max_grad_norm=1.0, **options)
    alone = cls(plain, lr=0.1, max_grad_norm=1.0, **options)
    for step in range(4):
        for params in (ours, plain):
            set_grads(params, 1 + step, scale=math.inf if step == 2 else 1.0)
        opt.step()
        alone.step()
        assert same_on_all(opt.grad_norm.item())
        assert type(opt.grad_norm) is torch.Tensor
        assert bool(opt.step_skipped) == bool(alone.step_skipped) == (step == 2)
        if step != 2:
            torch.testing.assert_close(opt.grad_norm, alone.grad_norm, rtol=1e-6, atol=0)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(full(a), b, rtol=1e-6, atol=1e-7)
        for name, value in alone.state[b].items():
            assert isinstance(opt.state[a][name], DTensor) == (name not in ("step", "mu_product"))
            torch.testing.assert_close(full(opt.state[a][name]), value, rtol=1e-5, atol=1e-7)


def every_class_on_shards(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    for cls in CLASSES:
        check_equals_one_process(mesh, [Shard(0)], cls)
    check_equals_one_process(mesh, [Shard(0)], CLASSES[0], backend="reference")
    check_equals_one_process(mesh, [Replicate()], CLASSES[0])


@pytest.mark.parametrize("world", [2, 4])
def test_sharded_steps_equal_those_of_one_process(world):
    over_ranks.run(every_class_on_shards, world, world)


def two_dimensions(rank):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    check_equals_one_process(mesh, [Replicate(), Shard(0)], CLASSES[0])
    check_equals_one_process(mesh, [Shard(0), Shard(0)], CLASSES[0])
    params = sharded(mesh, [Replicate(), Shard(0)])
    opt = fusedopt.FusedAdamW(params, max_grad_norm=1.0)
    set_grads(params, 1)
    if rank == 3:  # a replica that is an ulp off
        local = params[-1].grad._local_tensor
        local[0, 0] = torch.nextafter(local[0, 0], torch.tensor(math.inf))
    opt.step()
    assert same_on_all(opt.grad_norm.item())
    mix_of_meshes(mesh)


def mix_of_meshes(mesh):
    """Sharded over both dimensions, over one of them, and plain: one norm, each counted once."""
    values = tensors(0)
    params = [
        torch.nn.Parameter(placed(values[0], mesh, [Shard(0), Replicate()])),
        torch.nn.Parameter(placed(values[1], mesh["shard"], [Shard(0)])),
        torch.nn.Parameter(values[2]),
    ]
    grads = tensors(5)[:3]
    for param, grad in zip(params, grads, strict=True):
        is_sharded = isinstance(param, DTensor)
        param.grad = placed(grad, param.device_mesh, param.placements) if is_sharded else grad
    opt = fusedopt.FusedSGD(params, lr=0.1, max_grad_norm=1.0)
    opt.step()
    expected = torch.cat([grad.reshape(-1) for grad in grads]).double().norm()
    assert same_on_all(opt.grad_norm.item())
    torch.testing.assert_close(opt.grad_norm.double(), expected, rtol=1e-6, atol=0)


def test_a_mesh_of_two_dimensions_has_one_norm():
    over_ranks.run(two_dimensions, 4)


def make_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))


def older_fsdp(rank):
    """Each rank has a part of every flat parameter. The second batch gives nan on all ranks."""
    for use_orig_params in (True, False):
        alone = make_model()
        model = FSDP(make_model(), use_orig_params=use_orig_params, device_id=torch.device("cpu"))
        opt = fusedopt.FusedAdamW(
            model.parameters(),
            lr=0.1,
            max_grad_norm=0.1,
            process_group=dist.group.WORLD,
            plain="own",
        )
        other = fusedopt.FusedAdamW(alone.parameters(), lr=0.1, max_grad_norm=0.1)
        for step in range(3):
            batch = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
            if step == 1:
                batch *= math.inf
            for one, its in ((model, opt), (alone, other)):
                its.zero_grad()
                one(batch).square().sum().backward()
                its.step()
            assert same_on_all(opt.grad_norm.item())
            torch.testing.assert_close(opt.grad_norm, other.grad_norm, equal_nan=True)
            assert bool(opt.step_skipped) == bool(other.step_skipped) == (step == 1)
        params, options = list(model.parameters()), {"process_group": dist.group.WORLD}
        norm = fusedopt.clip_grad_norm_(params, math.inf, plain="own", **options)
        assert norm.item() == opt.grad_norm.item()
        for of in ({}, options):
            with pytest.raises(RuntimeError, match=r"parameter 0 is a part of Fully.*plain='own'"):
                fusedopt.clip_grad_norm_(params, 1.0, **of)
        with FSDP.summon_full_params(model):
            full_params = torch.cat([param.reshape(-1) for param in model.parameters()])
        expected = torch.cat([param.reshape(-1) for param in alone.parameters()])
        torch.testing.assert_close(full_params[: len(expected)], expected)  # then padding


def fully_sharded_model(rank):
    model, alone = make_model(), make_model()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    opt = fusedopt.FusedAdamW(model.parameters(), lr=0.1, max_grad_norm=0.1)
    other = fusedopt.FusedAdamW(alone.parameters(), lr=0.1, max_grad_norm=0.1)
    for step in range(3):
        batch = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        for one, its in ((model, opt), (alone, other)):
            its.zero_grad()
            one(batch).square().sum().backward()
            its.step()
        torch.testing.assert_close(opt.grad_norm, other.grad_norm)
        assert same_on_all(opt.grad_norm.item())
    for a, b in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(full(a), b)
        assert a._local_tensor.grad is None


def partial_gradients(rank):
    mesh = init_device_mesh("cpu", (2,))
    param = torch.nn.Parameter(distribute_tensor(torch.zeros(4), mesh, [Replicate()]))
    part = torch.arange(4.0) + rank
    param.grad = DTensor.from_local(part, mesh, [Partial()])
    opt = fusedopt.FusedSGD([param], lr=1.0, max_grad_norm=math.inf)
    opt.step()
    total = 2 * torch.arange(4.0) + 1
    torch.testing.assert_close(opt.grad_norm, total.norm())
    torch.testing.assert_close(full(param), -total)


def decisions(rank):
    """inf, a scaler's wish and a refusal on each rank in turn: all do the same."""
    mesh = init_device_mesh("cpu", (2,))
    for culprit in range(2):
        for index in (0, -1):
            params = sharded(mesh, [Shard(0)])
            opt = fusedopt.FusedAdamW(params, max_grad_norm=1.0, nonfinite="skip")
            set_grads(params, 1)
            if rank == culprit:
                params[index].grad._local_tensor[0] = math.nan
            before = [param._local_tensor.clone() for param in params]
            opt.step()
            assert bool(opt.step_skipped)
            kept = [param._local_tensor for param in params]
            assert all(map(torch.equal, before, kept))
            assert not opt.state
        set_grads(params, 1)
        opt.found_inf = torch.tensor(float(rank == culprit))
        opt.step()
        assert bool(opt.step_skipped)
        opt.found_inf = None
        refusal(rank, culprit, params, opt)
        opt.step()
        assert not bool(opt.step_skipped)
        names_on_all(rank, culprit, params)
        other_settings(rank, params)


def refusal(rank, culprit, params, opt):
    before = [param._local_tensor.clone() for param in params]
    if rank == culprit:
        opt.param_groups[0]["lr"] = -1.0
        opt._plan = None
        with pytest.raises(ValueError, match="learning rate"):
            opt.step()
        opt.param_groups[0]["lr"] = 1e-3
    else:
        with pytest.raises(fusedopt.PeerError, match=f"rank {culprit} refused.*learning rate") as e:
            opt.step()
        assert e.value.ranks == [culprit]
    assert all(map(torch.equal, before, [param._local_tensor for param in params]))


def names_on_all(rank, culprit, params):
    opt = fusedopt.FusedAdamW(params, nonfinite="raise")
    set_grads(params, 1)
    if rank == culprit:
        params[0].grad._local_tensor[0] = math.inf
    with pytest.raises(fusedopt.NonFiniteGradientError) as error:
        opt.step()
    expected = f"rank {culprit}: parameter 0 of param group 0"
    assert error.value.description == expected, error.value.description


def other_settings(rank, params):
    opt = fusedopt.FusedAdamW(params, max_grad_norm=1.0 + rank)
    set_grads(params, 1)
    with pytest.raises(fusedopt.PeerError, match=r"rank 0 has .*=1.0.*; rank 1 has .*=2.0"):
        opt.step()


def counted_collectives(rank):
    plain = [torch.nn.Parameter(value) for value in tensors(0)]
    opt = fusedopt.FusedAdamW(plain, max_grad_norm=1.0)
    set_grads(plain, 1)
    with counted_all_reduces() as calls:
        opt.step()
    assert not calls
    params = sharded(init_device_mesh("cpu", (2,)), [Shard(0)])
    for options in ({"max_grad_norm": 1.0}, {}):
        opt = fusedopt.FusedAdamW(params, **options)
        set_grads(params, 1)
        with counted_all_reduces() as calls:
            for _ in range(3):
                opt.step()
            _ = opt.grad_norm.item()
        assert len(calls) == 3
    assert same_on_all(opt.grad_norm.item())


def own_tensors(rank):
    """Whole tensors dealt over ranks: the bits of the exact sum, however they are dealt."""
    values, grads = tensors(0), tensors(1)
    norms = set()
    for deal in range(4):
        mine = [i for i in range(len(values)) if (i >> (deal & 1)) % 2 == (rank + deal // 2) % 2]
        params = [torch.nn.Parameter(values[i].clone()) for i in mine]
        for param, i in zip(params, mine, strict=True):
            param.grad = grads[i].clone()
        opt = fusedopt.FusedSGD(
            params, lr=0.1, max_grad_norm=1.0, process_group=dist.group.WORLD, plain="own"
        )
        opt.step()
        norms.add(opt._readings()[0].item())
    tied_embedding(rank, values[0], grads[0])
    sums = [fusedopt.reference.norms.chunk_sums(v, g) for v, g in zip(values, grads, strict=True)]
    assert norms == {math.fsum(torch.cat(sums).tolist())}


def tied_embedding(rank, value, grad):
    param = torch.nn.Parameter(value.clone())
    param.grad = grad.clone()
    group = {"params": [param], "counted": rank == 0}
    opt = fusedopt.FusedSGD(
        [group], lr=0.1, max_grad_norm=1.0, process_group=dist.group.WORLD, plain="own"
    )
    opt.step()
    torch.testing.assert_close(opt.grad_norm, grad.norm())


def unclipped_group(rank):
    mesh = init_device_mesh("cpu", (2,))
    ours, plain = sharded(mesh, [Shard(0)]), [torch.nn.Parameter(value) for value in tensors(0)]
    opt, alone = (
        fusedopt.FusedAdamW(
            [{"params": its[:2]}, {"params": its[2:], "clipped": False}], lr=0.1, max_grad_norm=1.0
        )
        for its in (ours, plain)
    )
    for step in range(5):
        for params in (ours, plain):
            set_grads(params, step, scale=math.inf if step == 2 else 1.0)
        for it in (opt, alone):
            it.param_groups[1]["clipped"] = step == 3
            it.step()
        assert bool(opt.step_skipped) == (step == 2)
        if step != 2:
            torch.testing.assert_close(opt.grad_norm, alone.grad_norm, rtol=1e-6, atol=0)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(full(a), b, rtol=1e-6, atol=1e-7)


def both_scalers(rank):
    mesh = init_device_mesh("cpu", (2,))
    for scaler_class in (fusedopt.GradScaler, torch.amp.GradScaler):
        for culprit in (None, 0, 1):
            params = sharded(mesh, [Shard(0)])
            opt = fusedopt.FusedAdamW(params, max_grad_norm=1.0)
            scaler = scaler_class("cpu", init_scale=8.0)
            scaler.scale(torch.tensor(1.0))
            set_grads(params, 1, scale=8.0)
            if rank == culprit:
                params[-1].grad._local_tensor[0] = math.inf
            scaler.step(opt)
            scaler.update()
            assert opt._steps_taken() == 1
            assert bool(opt.step_skipped) == (culprit is not None)
            torch.testing.assert_close(opt.grad_norm.isfinite(), ~opt.step_skipped)
            assert same_on_all(scaler.get_scale())
            assert scaler.get_scale() == (8.0 if culprit is None else 4.0)


@pytest.mark.parametrize(
    "body",
    [
        *(fully_sharded_model, older_fsdp, partial_gradients, decisions),
        *(counted_collectives, own_tensors, unclipped_group, both_scalers),
    ],
    ids=lambda body: body.__name__,
)
def test_two_ranks(body):
    over_ranks.run(body, 2)
