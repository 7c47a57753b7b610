"""Ours go on from bitsandbytes' and torchao's own optimizers, and theirs from ours.

Where a library is missing its tests are skipped by name; test_peer_checkpoints.py has its layout.
"""

from __future__ import annotations

import copy
import io
import sys

import pytest
import torch
from cases import assert_same_bits, make_params, set_grads, snapshot, tensors_of

import fusedopt

NOT_CONVERTED = [
    (fusedopt.FusedNAdam, {}, TypeError, "was given a FusedNAdam"),
    (fusedopt.FusedAdamW, {"maximize": True}, ValueError, "param group 0 has maximize=True"),
    (fusedopt.FusedAdamW, {"amsgrad": True}, ValueError, "param group 0 has amsgrad=True"),
    (fusedopt.FusedAdam, {"weight_decay": 0.1}, ValueError, "added to the gradient"),
]


@pytest.mark.parametrize(("cls", "options", "error", "message"), NOT_CONVERTED)
def test_what_bitsandbytes_does_not_have_is_not_converted(cls, options, error, message):
    with pytest.raises(error, match=message):
        fusedopt.convert.to_bitsandbytes(cls(make_params([(300,)]), **options))


@pytest.mark.parametrize(("cls", "options", "error", "message"), NOT_CONVERTED[:3])
def test_what_torchao_does_not_have_is_not_converted(cls, options, error, message):
    with pytest.raises(error, match=message):
        fusedopt.convert.to_torchao(cls(make_params([(300,)]), **options))


@pytest.mark.parametrize("cls", [fusedopt.FusedAdamW, fusedopt.FusedLion, fusedopt.FusedAdEMAMix])
def test_to_bitsandbytes_in_float32_and_back(cls):
    """Small tensors need no function of bitsandbytes."""
    params = make_params([(300,)], torch.bfloat16)
    optimizer = stepped(cls(params, state_dtype="8bit", master_weights="24bit"))
    before = snapshot(optimizer)
    saved = fusedopt.convert.to_bitsandbytes(optimizer)
    assert_same_bits(tensors_of(optimizer), before)
    assert type(saved["state"][0]["step"]) is int
    assert saved["state"][0]["state1"].dtype == torch.float32
    again = cls([it.detach().clone() for it in optimizer.param_groups[0]["params"]])
    again.param_groups[0]["params"][0].requires_grad_()
    again.param_groups[0].update(state_dtype="8bit", master_weights="24bit")
    again.load_state_dict(saved)
    found = {key: value for key, value in tensors_of(again).items() if "8bit" in key}
    assert found
    assert_same_bits(found, {key: before[key] for key in found})


# --- with the libraries themselves

SHAPES = [(80, 64), (33,), (4099,)]
PAIRS = [
    ("Adam", fusedopt.FusedAdam, {}),
    ("AdamW", fusedopt.FusedAdamW, {}),
    ("AdEMAMix", fusedopt.FusedAdEMAMix, {}),
    ("Lion", fusedopt.FusedLion, {"weight_decay": 0.1}),
    ("RMSprop", fusedopt.FusedRMSprop, {}),
    ("SGD", fusedopt.FusedSGD, {"lr": 0.01, "momentum": 0.9}),
]


def stepped(optimizer, seeds=(0, 1, 2)):
    for seed in seeds:
        set_grads([p for group in optimizer.param_groups for p in group["params"]], seed)
        optimizer.step()
    return optimizer


def through_a_file(checkpoint):
    """As a resumed run reads it. torchao's tensors can't be copied otherwise."""
    file = io.BytesIO()
    torch.save(checkpoint, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def copies_of(params):
    return [param.detach().clone().requires_grad_() for param in params]


@pytest.mark.parametrize(("name", "cls", "options"), PAIRS, ids=[pair[0] for pair in PAIRS])
@pytest.mark.parametrize("bits", ["", "8bit"])
def test_going_on_from_bitsandbytes_itself(name, cls, options, bits):
    library = pytest.importorskip("bitsandbytes").optim
    params = make_params(SHAPES)
    theirs = stepped(getattr(library, name + bits)(params, **options))
    ours = cls(copies_of(params), **({} if name != "RMSprop" else {"weight_decay": 0}))
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    for optimizer in (theirs, ours):
        stepped(optimizer, [5])
    for expected, found in zip(params, ours.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "cls", "options"), PAIRS[1:4], ids=["AdamW", "AdEMAMix", "Lion"])
@pytest.mark.parametrize("state_dtype", [None, "8bit"])
def test_bitsandbytes_itself_goes_on_from_ours(name, cls, options, state_dtype):
    library = pytest.importorskip("bitsandbytes")
    params = make_params(SHAPES)
    ours = stepped(cls(params, state_dtype=state_dtype, **options))
    saved = fusedopt.convert.to_bitsandbytes(ours)
    theirs = getattr(library.optim, name + (state_dtype or ""))(copies_of(params), lr=0.7)
    theirs.load_state_dict(copy.deepcopy(saved))
    assert theirs.param_groups[0]["lr"] == ours.param_groups[0]["lr"]
    values = fusedopt.convert.to_torch(ours)["state"]
    for index, param in enumerate(theirs.param_groups[0]["params"]):
        state = theirs.state[param]
        is_coded = state_dtype is not None and param.numel() >= 4096
        assert state["state1"].dtype == (torch.uint8 if is_coded else torch.float32)
        if is_coded and name != "AdEMAMix":
            expected, of_blocks = library.functional.quantize_blockwise(
                values[index]["exp_avg"], code=state["qmap1"], blocksize=256
            )
            assert torch.equal(state["state1"], expected)
            assert torch.equal(state["absmax1"], of_blocks.absmax)
    for optimizer in (theirs, ours):
        stepped(optimizer, [5])
    tolerance = 0.2 if state_dtype else 1e-5  # their 8 bits lose more; of an update of 1e-3
    for expected, found in zip(params, theirs.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=tolerance * 1e-3)


@pytest.mark.parametrize("name", ["Adam8bit", "AdamW8bit", "AdamW4bit", "AdamWFp8"])
def test_going_on_from_torchao_itself(name):
    library = pytest.importorskip("torchao.optim")
    params = make_params([(80, 64), (33,)])
    options = {"weight_decay": 0.1}
    cls = fusedopt.FusedAdamW if "AdamW" in name else fusedopt.FusedAdam
    if not hasattr(library, name):
        pytest.skip(f"this torchao has no {name}")
    with torch.compiler.set_stance("force_eager"):
        theirs = stepped(getattr(library, name)(params, **options))
        ours = cls(copies_of(params))
        ours.load_state_dict(through_a_file(theirs.state_dict()))
        for optimizer in (theirs, ours):
            stepped(optimizer, [5])
    for expected, found in zip(params, ours.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_torchao_itself_goes_on_from_ours():
    library = pytest.importorskip("torchao.optim")
    params = make_params([(80, 64), (33,)])
    ours = stepped(fusedopt.FusedAdamW(params, weight_decay=0.1))
    saved = fusedopt.convert.to_torchao(ours)
    theirs = library.AdamW8bit(copies_of(params))
    theirs.load_state_dict(through_a_file(saved))
    values = fusedopt.convert.to_torch(ours)["state"][0]
    with torch.compiler.set_stance("force_eager"):
        for key in values.keys() - {"step"}:
            state = theirs.state[theirs.param_groups[0]["params"][0]][key]
            expected = type(state).zeros(values[key].shape, key == "exp_avg").copy_(values[key])
            assert torch.equal(state.codes, expected.codes)
            assert torch.equal(state.scale, expected.scale)
        for optimizer in (theirs, ours):
            stepped(optimizer, [5])
    assert theirs.param_groups[0]["weight_decay"] == 0.1
    for expected, found in zip(params, theirs.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-4)


def test_torchao_is_needed_for_its_own_tensors(monkeypatch):
    optimizer = stepped(fusedopt.FusedAdamW(make_params([(80, 64)])))
    monkeypatch.setitem(sys.modules, "torchao.optim.subclass_8bit", None)
    with pytest.raises(ImportError, match="torchao"):
        fusedopt.convert.to_torchao(optimizer)


@pytest.mark.parametrize("cls", [fusedopt.FusedAdamW, fusedopt.FusedLion])
def test_by_way_of_float32_no_block_of_8_bits_changes(cls):
    ours = stepped(cls(make_params(SHAPES), state_dtype="8bit"))
    again = cls(copies_of(ours.param_groups[0]["params"]), state_dtype="8bit")
    again.load_state_dict(fusedopt.convert.to_torch(ours))
    assert_same_bits(tensors_of(again), tensors_of(ours))
