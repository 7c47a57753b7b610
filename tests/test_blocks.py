"""States of 8 bits: what is stored, how far it is off, and how it is loaded."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import CLASSES, assert_same_bits, make_params, set_grads, snapshot, tensors_of

import fusedopt
from fusedopt.reference.blocks import BLOCK_SIZE, RANDOM_MASK, decode, encode, num_blocks

IN_BLOCKS = {"state_dtype": "8bit"}
CODINGS = ["linear", "root"]
CODED = [
    case
    for case in CLASSES
    if {*case.cls.rule.tensors} <= case.cls.rule.codings.keys() or case.cls.rule.optional
]
SHAPES = [(3, 555), (), (64,), (17000,)]
codings = pytest.mark.parametrize("coding", CODINGS)


def by_reference(cls, params, **kwargs):
    return cls(params, backend="reference", **kwargs)


def values_for(coding, count=10_000, spread=3.0):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(count, generator=generator)
    values *= torch.exp(spread * torch.randn(count, generator=generator))
    return values if coding == "linear" else values * values


def stepped(make, device="cpu", dtype=torch.float32, steps=2, cls=fusedopt.FusedAdam, **kwargs):
    params = make_params(SHAPES, dtype, device)
    optimizer = make(cls, params, **kwargs)
    for seed in range(steps):
        set_grads(params, seed)
        optimizer.step()
    return optimizer


@codings
def test_a_linear_code_is_within_half_a_unit_and_a_root_within_one(coding):
    values = values_for(coding)
    random = torch.randint(0, RANDOM_MASK + 1, values.shape)
    codes, scales = encode(coding, values, random)
    found = decode(coding, codes, scales)
    units = scales.repeat_interleave(BLOCK_SIZE)[: values.numel()]
    if coding == "linear":
        assert ((found - values).abs() <= 0.5001 * units).all()
        assert codes.abs().max() == 127
    else:
        assert ((found.sqrt() - values.sqrt()).abs() <= 1.0001 * units).all()
        assert codes.min() == 1 and codes.max() == 255


def test_only_zero_has_the_code_zero():
    values = values_for("root", spread=8.0)
    values[::7] = 0
    codes, _ = encode("root", values, torch.zeros(values.shape, dtype=torch.int64))
    assert torch.equal(codes == 0, values == 0)


def test_roots_rounded_at_random_are_unbiased():
    values = torch.full((2**18,), 0.3**2)
    values[::BLOCK_SIZE] = 1.0
    random = torch.randint(0, RANDOM_MASK + 1, values.shape)
    roots = decode("root", *encode("root", values, random)).sqrt()[values < 1]
    assert abs(roots.double().mean() - 0.3) < 5 / 255 * 0.5 / 2**9


@codings
def test_conversion_to_float32_and_back_changes_no_block(coding):
    for spread in (0.0, 1.0, 5.0):
        once = encode(coding, values_for(coding, 2**20 + 3, spread))
        twice = encode(coding, decode(coding, *once))
        assert torch.equal(once[0], twice[0]) and torch.equal(once[1], twice[1])


@pytest.mark.parametrize("codes", [127.0, 255.0])
def test_a_scale_restores_itself(codes):
    """The scale of the largest code times the scale, for every float32 of one binade."""
    for first in range(0, 2**23, 2**20):
        largest = (torch.arange(first, first + 2**20).to(torch.int32) + (127 << 23)).view(
            torch.float32
        )
        steps = torch.full_like(largest, codes)
        scale = largest / steps
        assert torch.equal(scale * steps / steps, scale)


@codings
@pytest.mark.parametrize("what", [torch.nan, torch.inf])
def test_what_is_not_finite_makes_its_block_nan(coding, what):
    values = values_for(coding, 200)
    values[70] = what
    found = decode(coding, *encode(coding, values))
    assert found.isnan().nonzero().flatten().tolist() == list(range(64, 128))


@codings
def test_tiny_and_empty_blocks(coding):
    tiny = torch.full((70,), 2.0**-149)
    codes, scales = encode(coding, tiny)
    assert scales.isfinite().all() and (coding == "root") == (codes > 0).all()
    assert encode(coding, torch.zeros(0))[1].numel() == 0
    zero = encode(coding, torch.zeros(70))
    assert not zero[0].any() and not decode(coding, *zero).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_is_propagated_or_skipped(backend, dtype):
    results = []
    for make in (backend.make, by_reference):
        optimizer = stepped(make, backend.device, dtype, **IN_BLOCKS)
        param = optimizer.param_groups[0]["params"][3]
        for mode in ("skip", "propagate"):
            optimizer.nonfinite = mode
            before = snapshot(optimizer)
            set_grads(optimizer.param_groups[0]["params"], 7)
            param.grad[100] = torch.nan
            param.grad[16900] = torch.inf
            optimizer.step()
            if mode == "skip":
                assert_same_bits(tensors_of(optimizer), before)
        nans = optimizer.state[param]["exp_avg_scale"].isnan().nonzero().flatten().tolist()
        assert nans == [1, 16900 // BLOCK_SIZE]
        results.append({key: value.cpu() for key, value in tensors_of(optimizer).items()})
    assert_same_bits(*results)


@pytest.mark.parametrize("case", CODED, ids=str)
def test_keys_shapes_and_bytes(backend, case):
    options = {**case.kwargs, "momentum": 0.9} if case.cls is fusedopt.FusedRMSprop else case.kwargs
    optimizer = stepped(backend.make, backend.device, cls=case.cls, **IN_BLOCKS, **options)
    for param in optimizer.param_groups[0]["params"]:
        for name in optimizer.rule.states(optimizer.param_groups[0]):
            codes, scales = (optimizer.state[param][f"{name}_{it}"] for it in ("8bit", "scale"))
            assert name not in optimizer.state[param]
            assert codes.element_size() == 1 and codes.shape == param.shape
            assert scales.dtype == torch.float32
            assert scales.shape == (num_blocks(param.numel()),)


@pytest.mark.parametrize("case", CODED, ids=str)
def test_states_are_converted_on_load_and_between_steps(backend, case):
    """From float32 to 8 bits and back. Nothing but the rounding to nearest changes."""
    for first, second in (({}, IN_BLOCKS), (IN_BLOCKS, {"state_dtype": torch.float32})):
        optimizer = stepped(backend.make, backend.device, cls=case.cls, **first, **case.kwargs)
        params = [p.detach().clone().requires_grad_() for p in optimizer.param_groups[0]["params"]]
        loaded = backend.make(case.cls, params, **second, **case.kwargs)
        before = snapshot(optimizer)
        loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert_same_bits(snapshot(optimizer), before)
        optimizer.param_groups[0].update({"state_dtype": None} | second)
        for it in (optimizer, loaded):
            if it is loaded and it._provisional_state.counters:
                continue
            set_grads(it.param_groups[0]["params"], 5)
            it.step()
        keys = set(loaded.state[params[0]])
        assert any(key.endswith("_8bit") for key in keys) == (second is IN_BLOCKS)
        assert keys == set(optimizer.state[optimizer.param_groups[0]["params"][0]])
        assert_same_bits(tensors_of(loaded), tensors_of(optimizer))


def test_a_parameter_that_gets_another_layout_keeps_its_averages(backend):
    params = make_params([(8, 3, 5, 7)], device=backend.device)
    optimizer = backend.make(fusedopt.FusedAdam, params, **IN_BLOCKS)
    set_grads(params, 0)
    optimizer.step()
    state = optimizer.state[params[0]]
    before = decode("linear", state["exp_avg_8bit"], state["exp_avg_scale"])
    params[0].data = params[0].data.to(memory_format=torch.channels_last)
    params[0].grad = torch.zeros_like(params[0])
    optimizer.param_groups[0]["betas"] = (1 - 2**-20, 0.999)
    optimizer.step()
    assert state["exp_avg_8bit"].stride() == params[0].stride()
    after = decode("linear", state["exp_avg_8bit"], state["exp_avg_scale"])
    assert (after - before).abs().max() <= 1.01 * state["exp_avg_scale"].max()


REFUSED = [
    (fusedopt.FusedAdam, {"amsgrad": True}, "group 0 has state_dtype='8bit'.*'max_exp_avg_sq'"),
    (fusedopt.FusedRMSprop, {"centered": True}, "'grad_avg', which can't have 8 bits"),
    (fusedopt.FusedAdamax, {}, "'exp_inf', which can't have 8 bits: random rounding"),
]


@pytest.mark.parametrize(("cls", "options", "message"), REFUSED, ids=["adam", "rmsprop", "adamax"])
def test_rules_that_8_bits_do_not_suit_are_refused(cls, options, message):
    with pytest.raises(ValueError, match=message):
        cls(make_params([(3,)]), **IN_BLOCKS, **options)
    optimizer = stepped(by_reference, cls=cls, **options)
    optimizer.param_groups[0].update(IN_BLOCKS)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert_same_bits(tensors_of(optimizer), before)


def test_a_checkpoint_with_amsgrad_is_refused():
    other = stepped(by_reference, amsgrad=True)
    optimizer = stepped(by_reference, **IN_BLOCKS)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="'max_exp_avg_sq', which can't have 8 bits"):
        optimizer.load_state_dict(other.state_dict())
    assert_same_bits(tensors_of(optimizer), before)


BAD = [
    ("exp_avg_8bit", lambda it: it.to(torch.uint8), "is torch.uint8; expected torch.int8"),
    ("exp_avg_sq_8bit", lambda it: it.float(), "is torch.float32; expected torch.uint8"),
    ("exp_avg_8bit", lambda it: it[1:], "has shape .* expected the parameter's"),
    ("exp_avg_scale", lambda it: it[1:], r"expected \(27,\): one number for every 64 elements"),
    ("exp_avg_scale", lambda it: it.double(), "is torch.float64; expected torch.float32"),
    ("exp_avg_scale", lambda it: None, "has no 'exp_avg'"),
]


@pytest.mark.parametrize(("key", "change", "message"), BAD, ids=range(len(BAD)))
def test_bad_codes_and_scales_are_refused(key, change, message):
    optimizer = stepped(by_reference, **IN_BLOCKS)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0][key] = change(saved["state"][0][key])
    before = snapshot(optimizer)
    with pytest.raises((TypeError, RuntimeError), match=message):
        optimizer.load_state_dict(saved)
    assert_same_bits(tensors_of(optimizer), before)


def test_torch_refuses_the_checkpoint_loudly():
    optimizer = stepped(by_reference, **IN_BLOCKS)
    theirs = torch.optim.Adam(make_params(SHAPES))
    theirs.load_state_dict(optimizer.state_dict())
    set_grads(theirs.param_groups[0]["params"], 0)
    with pytest.raises(KeyError, match="exp_avg"):
        theirs.step()


def test_scales_that_share_memory_are_refused(backend):
    optimizer = stepped(backend.make, backend.device, **IN_BLOCKS)
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
    state["exp_avg_sq_scale"] = state["exp_avg_scale"]
    set_grads(optimizer.param_groups[0]["params"], 5)
    with pytest.raises(RuntimeError, match=r"'exp_avg_sq_scale' of .* shares memory with"):
        optimizer.step()
