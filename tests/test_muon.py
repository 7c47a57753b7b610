"""FusedMuon: torch's Muon, with our measuring, clipping and skipping."""

from __future__ import annotations

import copy
import math
import pickle

import over_ranks
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from cases import assert_same_bits, make_params, set_grads, snapshot, tensors_of
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn import Parameter
from torch.optim._muon import _zeropower_via_newtonschulz

import fusedopt
from fusedopt.clip import PerTensor
from fusedopt.core import backends
from fusedopt.optimizers import newton_schulz
from fusedopt.optimizers.newton_schulz import Iteration, orthogonalized

# Square, tall and wide, some alike; more than a chunk; a row, a column, and an empty one.
SHAPES = [(8, 8), (24, 5), (8, 8), (5, 24), (130, 127), (1, 3), (3, 1), (0, 4), (24, 5)]
OPTIONS = [
    {},
    {"nesterov": False, "weight_decay": 0.0},
    {"adjust_lr_fn": "match_rms_adamw", "momentum": 0.5},
    {"adjust_lr_fn": "original", "ns_steps": 3, "eps": 1e-3, "ns_coefficients": (2.0, -1.5, 0.5)},
    {"lr": torch.tensor(0.01)},
    {"nesterov": False},
    {"weight_decay": 0.5},
    {"momentum": 0.0},
    {"ns_coefficients": (3.0, -3.2, 1.2)},
    {"ns_steps": 0},
    {"ns_steps": 1},
    {"eps": 1e3},
    {"adjust_lr_fn": "match_rms_adamw"},
]
LR = {"lr": 0.02}


def train(optimizer, params, steps=4, first=0):
    for step in range(first, first + steps):
        set_grads(params, step)
        optimizer.step()
    return optimizer


def assert_close_to_torchs(params, others, ours, torchs, moved=4 * 0.02):
    """The matrices agree within what bfloat16 makes of the last bits; the momentum tightly."""
    for a, b in zip(params, others, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0.05 * moved)
        buffers = (it.state[p]["momentum_buffer"] for it, p in ((ours, a), (torchs, b)))
        torch.testing.assert_close(*buffers, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_is_torchs_muon(backend, options):
    params, others = make_params(SHAPES), make_params(SHAPES)
    ours = train(backend.make(fusedopt.FusedMuon, params, **{**LR, **options}), params)
    torchs = train(torch.optim.Muon(others, **{**LR, **options}), others)
    assert_close_to_torchs(params, others, ours, torchs)
    assert ours.state_dict()["param_groups"] == torchs.state_dict()["param_groups"]


@pytest.mark.parametrize("shape", [(2, 16, 16), (3, 40, 7), (1, 7, 40)], ids=str)
def test_orthogonalization_is_torchs(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    coefficients = (3.4445, -4.775, 2.0315)
    found = orthogonalized(matrices.clone(), Iteration(coefficients, 5, 1e-7, None))
    assert found.dtype == torch.bfloat16
    for matrix, its in zip(matrices, found, strict=True):
        expected = _zeropower_via_newtonschulz(matrix, coefficients, 5, 1e-7)
        torch.testing.assert_close(its, expected, rtol=0, atol=0.03)
        values = torch.linalg.svdvals(its.float())
        assert values.min() > 0.5 and values.max() < 1.3


@pytest.mark.parametrize("options", OPTIONS[:3], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_all_but_the_orthogonalization_is_exact(backend, monkeypatch, options, dtype):
    monkeypatch.setattr(newton_schulz, "orthogonalized", lambda matrices, iteration: matrices)
    params = make_params(SHAPES, dtype)
    opt = backend.make(fusedopt.FusedMuon, params, **{**LR, **options})
    group = opt.param_groups[0]
    momentum, decay = group["momentum"], 1 - 0.02 * group["weight_decay"]
    expected = [p.detach().to(torch.float64, copy=True) for p in params]
    buffers = [torch.zeros_like(p) for p in expected]
    for step in range(3):
        set_grads(params, step)
        opt.step()
        for index, param in enumerate(params):
            grad, shape = param.grad.double(), param.shape
            buffers[index] = momentum * buffers[index] + (1 - momentum) * grad
            direction = buffers[index]
            if group["nesterov"]:
                direction = momentum * direction + (1 - momentum) * grad
            ratio = math.sqrt(max(1, shape[0] / shape[1]))
            if group["adjust_lr_fn"] == "match_rms_adamw":
                ratio = 0.2 * math.sqrt(max(shape))
            expected[index] = expected[index] * decay - 0.02 * ratio * direction
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    for param, value in zip(params, expected, strict=True):
        torch.testing.assert_close(param.double(), value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kernels", [None, "reference"])
def test_telemetry_has_the_updates_norms(kernels):
    params = make_params(SHAPES[:4])
    opt = fusedopt.FusedMuon(params, lr=0.1, telemetry=3, backend=kernels, max_grad_norm=1.0)
    for step in range(5):
        set_grads(params, step, math.inf if step == 3 else 1.0)
        before = [p.detach().clone() for p in params]
        opt.step()
        rows = opt.telemetry().params.values()
        for old, param, row in zip(before, params, rows, strict=True):
            torch.testing.assert_close(
                row.update_norm[-1].float(), (param.detach() - old).norm(), rtol=1e-3, atol=0
            )
            assert row.param_norm[-1].isnan() == (step == 3)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_skipped_step_changes_nothing(backend, value):
    params = make_params(SHAPES)
    params[0].data[0] = -0.0
    opt = backend.make(fusedopt.FusedMuon, params, max_grad_norm=1.0, **LR)
    set_grads(params, 0)
    params[4].grad[129, 126] = value
    before = snapshot(opt)
    opt.step()
    assert_same_bits(tensors_of(opt), before)  # there is no state yet
    train(opt, params, 2)
    before = snapshot(opt)
    params[4].grad[129, 126] = value
    opt.step()
    assert opt.step_skipped and opt.skipped_steps == 2
    assert_same_bits(tensors_of(opt), before)
    opt.nonfinite = "raise"
    with pytest.raises(fusedopt.NonFiniteGradientError, match="parameter 4 of param group 0"):
        opt.step()
    assert_same_bits(tensors_of(opt), before)


def test_a_skip_that_the_host_does_not_know_of_changes_nothing(backend, monkeypatch):
    """As on a GPU, where the second half runs and reads the decision."""
    params = make_params(SHAPES)
    opt = backend.make(fusedopt.FusedMuon, params, max_grad_norm=1.0, **LR)
    train(opt, params, 2)
    before = snapshot(opt)
    set_grads(params, 3, math.nan)
    ran = []
    second_half = fusedopt.FusedMuon._end_step

    def end_step(self, mode, options, control):
        self._apply_directions(control)
        ran.append(True)
        second_half(self, mode, options, control)

    monkeypatch.setattr(fusedopt.FusedMuon, "_end_step", end_step)
    opt.step()
    assert ran and opt.step_skipped
    assert_same_bits(tensors_of(opt), before)


def test_clipping_is_that_of_clip_grad_norm(backend):
    params, others = make_params(SHAPES), make_params(SHAPES)
    ours = backend.make(fusedopt.FusedMuon, params, max_grad_norm=0.5, **LR)
    torchs = torch.optim.Muon(others, **LR)
    for step in range(4):
        set_grads(params, step)
        set_grads(others, step)
        norm = torch.nn.utils.clip_grad_norm_(others, 0.5)
        ours.grad_scale = torch.tensor(8.0) if step == 2 else None
        for param in params:
            param.grad.mul_(8.0 if step == 2 else 1.0)
        kept = [(p.grad, p.grad.clone()) for p in params]
        ours.step()
        torchs.step()
        torch.testing.assert_close(ours.grad_norm, norm)
        for param, (grad, value) in zip(params, kept, strict=True):
            assert param.grad is grad and torch.equal(grad, value)
    assert_close_to_torchs(params, others, ours, torchs)


@pytest.mark.parametrize("kernels", [None, "reference"])
def test_with_adamw_for_the_rest(kernels):
    matrices, rest = make_params(SHAPES), make_params([(7,), (3, 2, 2)])
    options = {"lr": 0.02, "max_grad_norm": 1.0, "backend": kernels}
    muon = fusedopt.FusedMuon(matrices, **options)
    adamw = fusedopt.FusedAdamW(rest, **options)
    others = make_params(SHAPES)
    torchs = torch.optim.Muon(others, lr=0.02)
    both = [*matrices, *rest]
    for step in range(4):
        set_grads(both, step)
        norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in both))
        if step == 2:
            rest[0].grad[1] = math.nan
        before = {**snapshot(muon), **{f"rest {k}": v for k, v in snapshot(adamw).items()}}
        fusedopt.step_together([muon, adamw])
        after = {**tensors_of(muon), **{f"rest {k}": v for k, v in tensors_of(adamw).items()}}
        assert bool(muon.step_skipped) == bool(adamw.step_skipped) == (step == 2)
        if step == 2:
            assert_same_bits(after, before)
            continue
        assert muon.grad_norm == adamw.grad_norm
        assert muon.grad_norm.item() == pytest.approx(norm, rel=1e-6)
        for a, b in zip(matrices, others, strict=True):
            b.grad = a.grad / norm
        torchs.step()
    assert_close_to_torchs(matrices, others, muon, torchs)


def test_a_group_that_is_not_clipped(backend):
    params, others = make_params(SHAPES), make_params(SHAPES)
    groups = [{"params": params[:1]}, {"params": params[1:], "clipped": False}]
    ours = backend.make(fusedopt.FusedMuon, groups, max_grad_norm=1e-3, **LR)
    train(ours, params)
    torchs = train(torch.optim.Muon(others, **LR), others)
    assert_close_to_torchs(params[1:], others[1:], ours, torchs)
    assert ours.state[params[0]]["momentum_buffer"].norm() < 1e-3


def test_checkpoints_of_torchs_and_for_it(backend):
    params, others = make_params(SHAPES), make_params(SHAPES)
    ours = train(backend.make(fusedopt.FusedMuon, params, **LR), params, 2)
    torchs = train(torch.optim.Muon(others, **LR), others, 2)
    state = copy.deepcopy(torchs.state_dict())
    torchs.load_state_dict(copy.deepcopy(ours.state_dict()))
    ours.load_state_dict(state)
    assert ours.state_dict()["state"].keys() == state["state"].keys()
    assert all(it.keys() == {"momentum_buffer"} for it in ours.state_dict()["state"].values())
    train(ours, params, 2, first=2)
    train(torchs, others, 2, first=2)
    assert_close_to_torchs(params, others, ours, torchs)


@pytest.mark.filterwarnings("ignore:.*torch.distributed is:UserWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_distributed_checkpoint_goes_on(tmp_path):
    """With the statistics of an adaptive limit."""
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4, bias=False) for _ in range(2)))
    other = copy.deepcopy(model)
    found = []
    for it in (model, other):
        opt = fusedopt.FusedMuon(it.parameters(), max_grad_norm=PerTensor(warmup=1), **LR)
        if it is model:
            train(opt, [*it.parameters()], 3)
        state = {"model": it.state_dict(), "opt": get_optimizer_state_dict(it, opt)}
        if it is model:
            dcp.save(state, checkpoint_id=tmp_path)
        else:
            dcp.load(state, checkpoint_id=tmp_path)
            it.load_state_dict(state["model"])
            set_optimizer_state_dict(it, opt, state["opt"])
        train(opt, [*it.parameters()], 3, first=3)
        found.append(tensors_of(opt))
    assert_same_bits(*found)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_a_copy_goes_on_by_itself(backend, copied):
    params = make_params(SHAPES)
    opt = train(backend.make(fusedopt.FusedMuon, params, max_grad_norm=1.0, **LR), params, 2)
    other = copied(opt)
    their_params = [p for group in other.param_groups for p in group["params"]]
    train(opt, params, 2, first=2)
    before = tensors_of(opt)
    train(other, their_params, 2, first=2)
    assert_same_bits(tensors_of(other), before)


def test_other_layouts_and_moved_tensors(backend):
    """Column-major matrices, one without a gradient, gradients of other strides."""
    params, others = make_params(SHAPES), make_params(SHAPES)
    params = [Parameter(p.detach().t().contiguous().t()) for p in params]
    ours = backend.make(fusedopt.FusedMuon, params, **LR)
    torchs = torch.optim.Muon(others, **LR)
    for step in range(4):
        set_grads(params, step)
        set_grads(others, step)
        if step == 1:
            params[2].grad = others[2].grad = None
        if step == 2:
            params[1].data = params[1].data.clone()
            ours.state[params[0]]["momentum_buffer"] = ours.state[params[0]][
                "momentum_buffer"
            ].clone()
        ours.step()
        torchs.step()
    assert_close_to_torchs(params, others, ours, torchs)


def test_batches_of_any_size(monkeypatch):
    found = []
    for limit in (1, 100, 1 << 24):
        monkeypatch.setattr(newton_schulz, "BATCH_ELEMENTS", limit)
        params = make_params(SHAPES)
        train(fusedopt.FusedMuon(params, **LR), params, 2)
        found.append(params)
    for params in found[1:]:
        for a, b in zip(params, found[0], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0.05 * 2 * 0.02)


def test_without_kernels(monkeypatch):
    monkeypatch.setattr(backends, "_C", None)
    monkeypatch.setattr(backends, "found", backends.found._replace(reason="of a test"))
    monkeypatch.setattr(backends, "_warned", set())
    params, others = make_params(SHAPES), make_params(SHAPES)
    with pytest.warns(RuntimeWarning, match="torch's own functions"):
        ours = train(fusedopt.FusedMuon(params, max_grad_norm=1e4, **LR), params)
    before = snapshot(ours)
    set_grads(params, 9, math.nan)
    ours.step()
    assert ours.step_skipped
    assert_same_bits(tensors_of(ours), before)
    torchs = train(torch.optim.Muon(others, **LR), others)
    assert_close_to_torchs(params, others, ours, torchs)


def dealt_matrices(rank):
    """With shard_states, and with matrices of its own on each rank: as one process."""
    dealt, alone, whole = (make_params(SHAPES) for _ in range(3))
    own = whole[rank::2]
    options = {**LR, "max_grad_norm": 1.0, "telemetry": 4}
    opts = [
        fusedopt.FusedMuon(alone, **options),
        fusedopt.shard_states(fusedopt.FusedMuon(dealt, **options)),
        fusedopt.FusedMuon(own, process_group=dist.group.WORLD, plain="own", **options),
    ]
    for step in range(4):
        for params in (alone, dealt, whole):
            set_grads(params, step, math.inf if step == 2 and params is not whole else 1.0)
        if step == 2 and rank == 1:
            own[0].grad[0, 0] = math.inf
        for opt in opts:
            opt.step()
            assert bool(opt.step_skipped) == (step == 2)
        if step != 2:
            assert opts[0].grad_norm == opts[1].grad_norm == opts[2].grad_norm
    assert 0 < len(opts[1].state) < len(dealt)
    for a, b in [*zip(alone, dealt, strict=True), *zip(alone[rank::2], own, strict=True)]:
        torch.testing.assert_close(a, b, rtol=0, atol=0.05 * 3 * 0.02)
    for opt in opts:
        norms = [it.update_norm[-1] for it in opt.telemetry().params.values()]
        assert any(norm > 0 for norm in norms)


def test_over_two_ranks():
    over_ranks.run(dealt_matrices, 2)


def test_the_options_of_the_second_half_are_those_before_the_first(backend):
    """A number whose reading changes the group has no effect on this step."""

    class Changes:
        def __float__(self):
            opt.param_groups[0]["ns_steps"] = "none"
            return 0.1

    params, others = make_params(SHAPES), make_params(SHAPES)
    expected = train(backend.make(fusedopt.FusedMuon, others, lr=0.1), others, 2)
    opt = train(backend.make(fusedopt.FusedMuon, params, lr=0.1), params, 1)
    opt.param_groups[0]["lr"] = Changes()
    set_grads(params, 1)
    opt.step()
    assert opt.param_groups[0]["ns_steps"] == "none"
    for param, other in zip(params, others, strict=True):
        assert torch.equal(param, other)
        buffers = (it.state[p]["momentum_buffer"] for it, p in ((opt, param), (expected, other)))
        assert torch.equal(*buffers)
