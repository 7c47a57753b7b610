"""Checkpoints for torch's own classes."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import CASES, assert_same_bits, make_params, set_grads, snapshot, tensors_of
from test_formats import UNCODED

import fusedopt

FORMATS = [
    {},
    {"master_weights": "24bit", "state_dtype": "8bit"},
    {"master_weights": "exact", "state_dtype": torch.bfloat16},
]
SHAPES = [(3, 555), (), (700,)]


@pytest.mark.parametrize("formats", FORMATS, ids=["none", "8bit", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_torch_goes_on_with_our_states(case, formats):
    if case in UNCODED and formats.get("state_dtype") == "8bit":
        pytest.skip("refused: see test_blocks.py")
    params = make_params(SHAPES, torch.bfloat16)
    ours = case.cls(params, max_grad_norm=1.0, **case.kwargs, **formats)
    for seed in range(2):
        set_grads(params, seed)
        ours.step()
    before = snapshot(ours)
    converted = fusedopt.convert.to_torch(ours)
    assert_same_bits(tensors_of(ours), before)

    masters = fusedopt.master_weights(ours).values()
    wide = [it.clone().requires_grad_() for it in masters]
    theirs = case.twin(wide, **case.kwargs)
    theirs.load_state_dict(copy.deepcopy(converted))
    again = case.cls([it.detach().clone().requires_grad_() for it in wide], **case.kwargs)
    again.load_state_dict(copy.deepcopy(converted))
    for optimizer in (theirs, again):
        assert not {"master_weights", "seed"} & optimizer.param_groups[0].keys()
        set_grads(optimizer.param_groups[0]["params"], 5)
        optimizer.step()
    for expected, found in zip(wide, again.param_groups[0]["params"]):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_other_optimizers_are_refused():
    with pytest.raises(TypeError, match="to_torch was given a SGD"):
        fusedopt.convert.to_torch(torch.optim.SGD(make_params([(3,)])))
