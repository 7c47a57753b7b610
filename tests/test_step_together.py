"""Several optimizers that step as one: one norm and one decision, on one rank and over ranks."""

import math

import over_ranks
import pytest
import torch
import torch.distributed as dist
from cases import assert_same_bits
from rank_tensors import counted_all_reduces, same_on_all, set_grads, sharded, tensors
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard

import fusedopt
from fusedopt import step_together

OPTIONS = {"lr": 0.1, "max_grad_norm": 1.0}


def params_of(seed=0):
    params = [torch.nn.Parameter(value) for value in tensors(seed)]
    set_grads(params, 1)
    return params


def pair(params, **options):
    options = {**OPTIONS, **options}
    adam = fusedopt.FusedAdamW(params[:2], **options)
    return adam, fusedopt.FusedSGD(params[2:], momentum=0.9, **options)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_the_norm_and_the_decision_are_those_of_all(backend):
    """As two optimizers of which each clips to what the common norm leaves it."""
    params, expected = params_of(), params_of()
    both = pair(params, backend=backend)
    alone = pair(expected, max_grad_norm=None, backend=backend)
    for step in range(4):
        for its in (params, expected):
            set_grads(its, step + 1, scale=math.inf if step == 2 else 1.0)
        step_together(both)
        norms = [it.grad_norm.item() for it in both]
        assert [bool(it.step_skipped) for it in both] == [step == 2] * 2
        if step != 2:
            norm = fusedopt.clip_grad_norm_(expected, 1.0).item()
            assert norms[0] == norms[1] == pytest.approx(norm, rel=1e-6)
            for it in alone:
                it.step()
    for a, b in zip(params, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_step_alone_between_goes_on():
    params = params_of()
    both = pair(params)
    step_together(both)
    both[0].step()
    assert both[0].grad_norm.item() == pytest.approx(
        math.hypot(*(param.grad.norm().item() for param in params[:2]))
    )
    step_together(both)
    assert both[0].grad_norm.item() == both[1].grad_norm.item()
    assert [it._steps_taken() for it in both] == [3, 2]


def test_nonfinite_names_the_parameters_of_all():
    params = params_of()
    both = pair(params, nonfinite="raise")
    params[1].grad[0] = math.nan
    params[4].grad[0] = math.inf
    before = [param.detach().clone() for param in params]
    with pytest.raises(fusedopt.NonFiniteGradientError) as error:
        step_together(both)
    assert error.value.names == ["parameter 1 of param group 0", "parameter 2 of param group 0"]
    assert_same_bits(dict(enumerate(before)), {i: it.detach() for i, it in enumerate(params)})


def test_what_doesnt_fit_is_refused_and_changes_nothing():
    params = params_of()
    adam, sgd = pair(params)
    before = [param.detach().clone() for param in params]
    with pytest.raises(TypeError, match="a SGD at index 1; expected fused"):
        step_together([adam, torch.optim.SGD(params)])
    for optimizers in ([], [adam, adam]):
        with pytest.raises(ValueError, match="expected one or more, each once"):
            step_together(optimizers)
    sgd.max_grad_norm = 2.0
    with pytest.raises(ValueError, match=r"max_grad_norm=1.0.* max_grad_norm=2.0"):
        step_together([adam, sgd])
    sgd.max_grad_norm = 1.0
    params[-1].grad = params[-1].grad.to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        step_together([adam, sgd])
    assert_same_bits(dict(enumerate(before)), {i: it.detach() for i, it in enumerate(params)})
    assert not adam.state and adam._own["part"] is None
    set_grads(params, 1)
    step_together([adam, sgd])


def test_schedulers_and_hooks_see_a_step_of_each():
    both = pair(params_of())
    schedulers = [torch.optim.lr_scheduler.StepLR(it, 1, 0.5) for it in both]
    seen = []
    for it in both:
        it.register_step_post_hook(lambda *_: seen.append(1))
    step_together(both)
    for scheduler in schedulers:
        scheduler.step()
    assert len(seen) == 2


def stages(rank):
    """Each rank has its own stages, sharded ones beside, and one of them refuses in its turn."""
    whole = [*tensors(1), *tensors(1)]
    options = {**OPTIONS, "process_group": dist.group.WORLD, "plain": "own"}
    params = sharded(init_device_mesh("cpu", (2,)), [Shard(0)])
    mine = [torch.nn.Parameter(value) for value in tensors(0)[rank::2]]
    both = fusedopt.FusedAdamW(params, **options), fusedopt.FusedSGD(mine, **options)
    set_grads(params, 1)
    for param, grad in zip(mine, tensors(1)[rank::2], strict=True):
        param.grad = grad
    for _ in range(2):
        with counted_all_reduces() as calls:
            step_together(both)
        assert len(calls) == 1
        norm = torch.cat([grad.reshape(-1) for grad in whole]).norm()
        for it in both:
            torch.testing.assert_close(it.grad_norm, norm)
            assert same_on_all(it.grad_norm.item())
    for culprit in range(2):
        before = [it.detach().clone() for it in mine]
        if rank == culprit:
            both[1].param_groups[0]["lr"] = -1.0
            both[1]._plan = None
        expected = ValueError if rank == culprit else fusedopt.PeerError
        with pytest.raises(expected, match="learning rate"):
            step_together(both)
        assert all(map(torch.equal, before, mine))
        both[1].param_groups[0]["lr"] = 0.1
        step_together(both)


def test_over_ranks_it_is_one_message():
    over_ranks.run(stages, 2)
