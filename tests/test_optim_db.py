"""torch's own test inputs for its optimizers: the same results, the same errors."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from cases import CLASSES, tensors_of

pytest.importorskip("expecttest", reason="torch's own test machinery needs it")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # whatever it warns of, it is not about us
    from torch.testing._internal.common_optimizers import optim_db

OURS = {case.twin: case.cls for case in CLASSES}
INFOS = [info for info in optim_db if info.optim_cls in OURS]


def make_model(dtype):
    """A model in which one parameter is sometimes frozen, one has no gradient, one is empty."""
    torch.manual_seed(1)
    norm = torch.nn.BatchNorm2d(2, eps=1e-5, momentum=0.1)
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 2, 1, stride=2), norm).to(dtype)
    rest = [torch.randn(2, 3, dtype=dtype), torch.ones(1, dtype=dtype), torch.zeros(0, dtype=dtype)]
    return model, [*model.parameters(), *map(torch.nn.Parameter, rest)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.optim_cls.__name__)
def test_seven_steps_of_every_input(info, dtype):
    inputs = info.optim_inputs_func("cpu", dtype)
    assert len(inputs) > 3
    torch.manual_seed(0)
    images = torch.randn(2, 4, 3, 3, dtype=dtype)
    for options in (item.kwargs for item in inputs):
        (_, params), (model, twins) = make_model(dtype), make_model(dtype)
        fused = OURS[info.optim_cls](params, **copy.deepcopy(options))
        twin = info.optim_cls(twins, **{**copy.deepcopy(options), "foreach": False})
        for step in range(7):
            twin.zero_grad()
            model[0].requires_grad_(step != 2)
            (model(images).square().sum() + twins[-3].square().sum()).backward()
            if step == 5:
                twins[-3].grad = None
            for param, source in zip(params, twins):
                param.grad = None if source.grad is None else source.grad.clone()
            fused.step()
            twin.step()
        actual, expected = tensors_of(fused), tensors_of(twin)
        torch.testing.assert_close(actual, expected, msg=lambda text, o=options: f"{o}: {text}")


def outcome_of(cls, params, options):
    try:
        cls(copy.deepcopy(params), **options)
    except Exception as error:
        return type(error), str(error)
    return None


@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.optim_cls.__name__)
def test_every_bad_input_is_refused_in_the_same_words(info):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for item in info.optim_error_inputs_func("cpu", torch.float32):
            params, options = item.optimizer_error_input.params, item.optimizer_error_input.kwargs
            expected = outcome_of(info.optim_cls, params, options)
            assert outcome_of(OURS[info.optim_cls], params, options) == expected, options
