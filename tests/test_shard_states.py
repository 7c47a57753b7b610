"""States dealt over the ranks of DDP: the same bits as without, and a part of the memory."""

import copy
import math
import os
from unittest import mock

import over_ranks
import pytest
import torch
import torch.distributed as dist
from cases import CLASSES, assert_same_bits, same_bits, set_grads, tensors_of
from hypothesis import given
from hypothesis import strategies as st
from rank_tensors import counted_all_reduces, on_all, same_on_all
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.nn import Parameter

import fusedopt
from fusedopt.clip import Percentile, PerTensor, Unit, ZScore
from fusedopt.distributed import share as shares
from fusedopt.distributed.share import deal

SHAPES = [(5,), (0,), (3, 4, 2, 2), (), (17000,), (200, 13), (3,)]
# Of the gradients, by step: a spike, and a step without a finite gradient.
SCALES = [1.0, 30.0, math.nan, 1.0, 2.0]
LATE = 3  # this parameter's first gradient arrives at the fourth step
OPTIONS = [
    (fusedopt.FusedAdamW, {"amsgrad": True, "nonfinite": "propagate"}),
    (fusedopt.FusedAdamW, {"max_grad_norm": Percentile(80, window=3, warmup=1)}),
    (fusedopt.FusedAdamW, {"max_grad_norm": ZScore(warmup=1)}),
    (fusedopt.FusedSGD, {"max_grad_norm": PerTensor(warmup=1), "momentum": 0.9}),
    (fusedopt.FusedAdam, {"max_grad_norm": Unit(0.1)}),
    (fusedopt.FusedAdamW, {"max_grad_norm": 1.0, "backend": "reference"}),
]
MIXED = [
    (fusedopt.FusedAdamW, {"master_weights": "exact", "state_dtype": torch.bfloat16}),
    (fusedopt.FusedSGD, {"rounding": "stochastic", "seed": 3}),
    (fusedopt.FusedAdamW, {"master_weights": "24bit", "state_dtype": "8bit"}),
]


def make_params(shapes=SHAPES, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(it, generator=generator).to(dtype)) for it in shapes]
    for param in params:
        if param.dim() == 4:
            param.data = param.data.to(memory_format=torch.channels_last)
    return params


def run(opt, params, scales=SCALES, first=0):
    """The norm, the factor and the decision of each step."""
    found = []
    for number, scale in enumerate(scales, first):
        set_grads(params, number, scale)
        if len(params) > LATE and number < LATE:
            params[LATE].grad = None
        opt.step()
        found.append(opt._readings().tolist())
    return found


def of_share(opt, tensors):
    """Those of the parameters, and of the states that this rank keeps."""
    params = [p for group in opt.param_groups for p in group["params"]]
    away = {str(i) for i, param in enumerate(params) if not opt._keeps(param)}
    return {k: v for k, v in tensors.items() if k.startswith("param ") or k.split()[1] not in away}


def check_equals_unsharded(cls, options, shapes=SHAPES, dtype=torch.float32):
    alone, params = make_params(shapes, dtype), make_params(shapes, dtype)
    groups = [{"params": params[::2], "lr": 0.05}, {"params": params[1::2]}]
    groups_alone = [{"params": alone[::2], "lr": 0.05}, {"params": alone[1::2]}]
    options = {"lr": 0.1, "telemetry": 4, **options}
    other = cls(groups_alone, **options)
    opt = fusedopt.shard_states(cls(groups, **options))
    expected, found = run(other, alone), run(opt, params)
    for a, b in zip(found, expected, strict=True):
        assert same_bits(torch.tensor(a), torch.tensor(b)), (a, b)
    assert_same_bits(tensors_of(opt), of_share(opt, tensors_of(other)))
    for name in ("step", "grad_norm", "clip_coef", "skipped", "lr"):
        assert same_bits(getattr(opt.telemetry(), name), getattr(other.telemetry(), name))
    check_rows_of_share(opt, other)
    learned = opt._own["clip_state"]
    assert learned is None or same_bits(learned, other._own["clip_state"])
    assert all(opt._keeps(param) for param in opt.state)
    dealt = [i for its in on_all([*map(opt._keeps, params)]) for i, kept in enumerate(its) if kept]
    assert sorted(dealt) == list(range(len(params)))
    return opt


def check_rows_of_share(opt, other):
    """Telemetry of single parameters: of this rank's share, and nan of the others."""
    params = [p for group in opt.param_groups for p in group["params"]]
    rows, expected = (it.telemetry().params for it in (opt, other))
    for param, name in zip(params, rows, strict=True):
        assert rows[name].numel == param.numel()
        for column in ("grad_norm", "grad_max", "infs", "nans", "update_norm", "param_norm"):
            found = getattr(rows[name], column)
            if opt._keeps(param):
                assert same_bits(found, getattr(expected[name], column)), (name, column)
            else:
                assert found.isnan().all()


def all_equal_unsharded(rank):
    for case in CLASSES:
        check_equals_unsharded(case.cls, {**case.kwargs, "max_grad_norm": 1.0})
    for cls, options in OPTIONS:
        check_equals_unsharded(cls, options)
    for cls, options in MIXED:
        check_equals_unsharded(cls, {"max_grad_norm": 1.0, **options}, dtype=torch.bfloat16)
    check_equals_unsharded(fusedopt.FusedAdamW, {"max_grad_norm": 1.0}, shapes=[(3,)])
    with mock.patch.object(shares, "BUCKET_BYTES", 100):
        opt = check_equals_unsharded(fusedopt.FusedAdamW, {"max_grad_norm": 1.0})
    what_is_sent(opt)


def what_is_sent(opt):
    """One all-reduce and the buckets; after a skip no bucket."""
    params = [p for group in opt.param_groups for p in group["params"]]
    with (
        counted_all_reduces() as reduces,
        mock.patch.object(dist, "broadcast", wraps=dist.broadcast) as broadcasts,
    ):
        run(opt, params, [1.0], first=9)
        buckets = len({opt._own["share"].owners[it] for it in params if it.numel() > 0})
        assert (len(reduces), broadcasts.call_count) == (1, buckets)
        before = [param._version for param in params]
        run(opt, params, [math.inf], first=9)
        assert (len(reduces), broadcasts.call_count) == (2, buckets)
        assert bool(opt.step_skipped)
        assert [param._version for param in params] == before


@pytest.mark.parametrize("world", [2, 4])
def test_the_bits_are_those_of_an_unsharded_optimizer(world):
    over_ranks.run(all_equal_unsharded, world)


@given(st.lists(st.integers(0, 1000), max_size=40), st.integers(1, 9))
def test_the_deal_is_balanced(sizes, ranks):
    owners = deal(sizes, ranks)
    assert owners == deal(sizes, ranks)
    loads = [0] * ranks
    for size, owner in zip(sizes, owners, strict=True):
        loads[owner] += size
    assert sum(loads) == sum(sizes)
    assert max(loads) - min(loads) <= max(sizes, default=0)


def decisions(rank):
    """inf, a scaler's wish, a refusal and a name on each rank in turn: all do the same."""
    for culprit in range(2):
        params = make_params()
        opt = fusedopt.shard_states(fusedopt.FusedAdamW(params, lr=0.1, max_grad_norm=1.0))
        mine = next(i for i, param in enumerate(params) if opt._keeps(param) and param.numel() > 0)
        run(opt, params, [1.0])
        before = copy.deepcopy(params)
        set_grads(params, 1)
        if rank == culprit:
            params[mine].grad.view(-1)[0] = math.inf
        opt.step()
        assert bool(opt.step_skipped)
        set_grads(params, 1)
        opt.found_inf = torch.tensor(float(rank == culprit))
        opt.step()
        assert bool(opt.step_skipped)
        opt.found_inf = None
        opt.param_groups[0]["lr"] = -1.0 if rank == culprit else 0.1
        refusal = pytest.raises(ValueError, match="learning rate")
        if rank != culprit:
            refusal = pytest.raises(fusedopt.PeerError, match=f"rank {culprit} refused.*learning")
        with refusal:
            opt.step()
        opt.param_groups[0]["lr"] = 0.1
        assert all(map(torch.equal, before, params))
        opt.nonfinite = "raise"
        if rank == culprit:
            params[mine].grad.view(-1)[0] = math.nan
        with pytest.raises(fusedopt.NonFiniteGradientError, match=f"rank {culprit}: param") as e:
            opt.step()
        assert len(set(on_all(str(e.value)))) == 1
        assert all(map(torch.equal, before, params))


def scalers(rank):
    for scaler_class in (fusedopt.GradScaler, torch.amp.GradScaler):
        alone, params = make_params(), make_params()
        opt = fusedopt.shard_states(fusedopt.FusedAdamW(params, lr=0.1, max_grad_norm=1.0))
        other = fusedopt.FusedAdamW(alone, lr=0.1, max_grad_norm=1.0)
        scales = []
        for its, one in ((params, opt), (alone, other)):
            scaler = scaler_class("cpu", init_scale=8.0, growth_interval=2)
            scaler.scale(torch.tensor(1.0))
            for number, scale in enumerate(SCALES):
                set_grads(its, number, 8.0 * scale)
                scaler.step(one)
                scaler.update()
            scales.append(scaler.get_scale())
        assert scales[0] == scales[1]
        if scaler_class is fusedopt.GradScaler:
            assert_same_bits(tensors_of(opt), of_share(opt, tensors_of(other)))
        assert same_on_all(float(sum(p.detach().double().sum() for p in params)))


def steps_together(rank):
    """Two optimizers with one norm, each sharded, and copies that are compared."""
    found = []
    for sharded in (False, True):
        params = make_params()
        options = {"lr": 0.1, "max_grad_norm": 1.0, "check_replicas": 1}
        opts = [
            fusedopt.FusedAdamW(params[::2], **options),
            fusedopt.FusedSGD(params[1::2], momentum=0.9, **options),
        ]
        if sharded:
            opts = [fusedopt.shard_states(it) for it in opts]
        for number in range(3):
            set_grads(params, number)
            fusedopt.step_together(opts)
        found.append([p.detach() for p in params])
        if sharded:
            params[0].grad += rank
            with pytest.raises(fusedopt.ReplicasDifferError, match="parameter 0"):
                opts[0].step()
    assert all(map(torch.equal, *found))


def init_state_and_masters(rank):
    params = make_params(dtype=torch.bfloat16)
    opt = fusedopt.FusedAdamW(params, lr=0.1, max_grad_norm=1.0, master_weights="exact")
    run(opt, params, [1.0])
    fusedopt.shard_states(opt)  # drops the states of others
    assert all(opt._keeps(param) for param in opt.state)
    masters = fusedopt.master_weights(opt)
    assert len(masters) == sum(map(opt._keeps, params))
    params = make_params()
    opt = fusedopt.shard_states(fusedopt.FusedAdamW(params, lr=0.1))
    opt.init_state()
    assert set(opt.state) == {param for param in params if opt._keeps(param)}


def two_ranks(rank):
    for body in (decisions, scalers, steps_together, init_state_and_masters, refusals):
        body(rank)


def refused(error, words, optimizer, group=None):
    with pytest.raises(error, match=words):
        fusedopt.shard_states(optimizer, group)


def refusals(rank):
    refused(TypeError, "was given a Adam;", torch.optim.Adam(make_params()))
    opt = fusedopt.shard_states(fusedopt.FusedSGD(make_params()))
    refused(RuntimeError, "called twice", opt)
    with pytest.raises(ValueError, match=r"parameter 0 of param group 1 came after shard_states"):
        opt.add_param_group({"params": make_params()})
    assert len(opt.param_groups) == 1
    opt.param_groups[0]["params"].append(make_params()[0])
    set_grads(opt.param_groups[0]["params"], 0)
    with pytest.raises(ValueError, match=r"parameter 7 of param group 0 came after shard_states"):
        opt.step()
    with pytest.raises(TypeError, match="can't be copied or pickled"):
        copy.deepcopy(opt)
    named = fusedopt.FusedSGD(make_params(), process_group=dist.group.WORLD)
    refused(ValueError, "given an optimizer with process_group=", named)
    mesh = init_device_mesh("cpu", (2,))
    tensor = Parameter(distribute_tensor(torch.zeros(3), mesh, [Replicate()]))
    refused(TypeError, "parameter 0 of param group 0 is a DTensor", fusedopt.FusedSGD([tensor]))
    frozen = make_params()
    frozen[2].requires_grad_(False)
    refused(ValueError, "parameter 2 of .* requires no gradient", fusedopt.FusedSGD(frozen))
    meta = Parameter(torch.zeros(3, device="meta"))
    refused(ValueError, "parameter 0 .* has no memory yet", fusedopt.FusedSGD([meta]))
    refused(ValueError, "expected the ProcessGroup", fusedopt.FusedSGD(make_params()), mesh)
    own_group = [dist.new_group([it]) for it in range(2)]
    refused(ValueError, "expected the Proc", fusedopt.FusedSGD(make_params()), own_group[1 - rank])
    lists = fusedopt.FusedSGD(make_params()[: 4 - rank])
    words = r"rank 0 has parameter 3 of param group 0, \(\) torch.float32; rank 1 has no parameter"
    refused(ValueError, words, lists)
    one = torch.optim.SGD(make_params()) if rank == 1 else fusedopt.FusedSGD(make_params())
    refused(TypeError if rank == 1 else fusedopt.PeerError, "was given a SGD;", one)
    one = frozen if rank == 1 else make_params()
    error = ValueError if rank == 1 else fusedopt.PeerError
    refused(error, "requires no gradient", fusedopt.FusedSGD(one))
    with pytest.raises(ValueError, match="Invalid to: 2"):
        fusedopt.consolidated_state_dict(fusedopt.shard_states(fusedopt.FusedSGD(make_params())), 2)


def test_two_ranks_decide_alike_and_refuse_by_name():
    over_ranks.run(two_ranks, 2)


def lost_while_gathering(rank):
    params = make_params()
    opt = fusedopt.shard_states(fusedopt.FusedAdamW(params, lr=0.1, max_grad_norm=1.0))
    run(opt, params, [1.0])
    set_grads(params, 1)
    if rank == 1:
        opt._own["share"].gather = lambda params: os._exit(0)
    with pytest.raises(fusedopt.PeerError, match="lost while the ranks gathered updated"):
        opt.step()
    os._exit(0)


def test_a_rank_that_is_lost_while_parameters_are_gathered_is_named_so():
    over_ranks.run(lost_while_gathering, 2)


def test_without_a_process_group():
    with pytest.raises(RuntimeError, match=r"expected torch.distributed.init_process_group\(\)"):
        fusedopt.shard_states(fusedopt.FusedSGD(make_params()))
    opt = fusedopt.FusedAdamW(make_params())
    opt.init_state()
    assert fusedopt.consolidated_state_dict(opt).keys() == opt.state_dict().keys()
    with pytest.raises(TypeError, match="was given a Adam"):
        fusedopt.consolidated_state_dict(torch.optim.Adam(make_params()))
