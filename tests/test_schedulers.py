"""Every scheduler of torch drives our optimizers as it drives torch's."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import CASES, CLASSES, make_params, set_grads, tensors_of
from torch.optim import lr_scheduler, swa_utils

import fusedopt

STEPS = 7
MAKERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda n: 0.9**n),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda n: 0.8),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.1),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 4], 0.1),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.2, total_iters=5),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.7),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 5, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 2, cycle_momentum=cycles(o)),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(
        o, 0.1, total_steps=STEPS + 2, cycle_momentum=cycles(o)
    ),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)],
        milestones=[3],
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)], optimizer=o
    ),
    "SWALR": lambda o: swa_utils.SWALR(o, 0.05, anneal_epochs=3),
}


def cycles(optimizer):
    """Whether the optimizer has a momentum to cycle: `momentum` or `betas`."""
    return bool({"momentum", "betas"} & optimizer.defaults.keys())


def test_every_scheduler_of_torch_is_here():
    of_torch = {name for name in lr_scheduler.__all__ if name != "LRScheduler"}
    assert of_torch | {"SWALR"} == MAKERS.keys()


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1, dtype=torch.float64)], ids=["0.1", "tensor"])
@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_scheduler_as_with_torch(case, name, lr):
    compare_with_twin(case, MAKERS[name], lr)


@pytest.mark.parametrize("name", ["CyclicLR", "OneCycleLR"])
@pytest.mark.parametrize("case", [case for case in CASES if "momentum" in case.kwargs], ids=str)
def test_momentum_that_is_cycled(case, name):
    compare_with_twin(case, MAKERS[name], 0.1)


def compare_with_twin(case, make, lr):
    params, twins = (make_params([(33,), (4, 5)], torch.float64) for _ in range(2))
    kwargs = {**case.kwargs, "lr": lr}
    both = [
        case.cls(params, **copy.deepcopy(kwargs)),
        case.twin(twins, foreach=False, **copy.deepcopy(kwargs)),
    ]
    schedulers = [make(optimizer) for optimizer in both]
    for seed in range(STEPS):
        for optimizer, scheduler in zip(both, schedulers):
            set_grads(optimizer.param_groups[0]["params"], seed)
            optimizer.step()
            plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
            scheduler.step(*([1.0] if plateau else []))
        ours, theirs = (
            {k: v for k, v in o.param_groups[0].items() if k not in ("params", "foreach")}
            for o in both
        )
        assert ours == theirs
        assert isinstance(ours["lr"], torch.Tensor) == isinstance(lr, torch.Tensor)
    torch.testing.assert_close(tensors_of(both[0]), tensors_of(both[1]))
    states = [scheduler.state_dict() for scheduler in schedulers]
    assert states[0].keys() == states[1].keys()


@pytest.mark.parametrize("cls", [fusedopt.FusedAdamW, fusedopt.FusedLion])
def test_a_decay_that_only_the_schedule_scales(cls):
    """docs/migrating.md: decay / lr as weight decay, for Composer's and optimi's decoupling."""
    lr, decay, expected = 0.1, 0.02, 1.0
    param = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    param.grad = torch.zeros_like(param)  # only the decay changes it
    optimizer = cls([param], lr=lr, weight_decay=decay / lr)
    schedule = lr_scheduler.ExponentialLR(optimizer, 0.7)
    for step in range(STEPS):
        optimizer.step()
        schedule.step()
        expected *= 1 - decay * 0.7**step
    torch.testing.assert_close(param.detach(), torch.full_like(param, expected))
