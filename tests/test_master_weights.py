"""Master weights: 16-bit parameters that train as float32."""

from __future__ import annotations

import copy
import io
import logging
import os
from collections.abc import Iterator

import pytest
import torch
from cases import CASES, CLASSES, assert_same_bits, make_params, set_grads, snapshot, tensors_of

import fusedopt
from fusedopt.core import check_formats
from fusedopt.reference.formats import convert_rest, extended, join, split

HALVES = [torch.bfloat16, torch.float16]
EXACT = {"master_weights": "exact", "state_dtype": torch.float32}
IN_24_BITS = {"master_weights": "24bit", "state_dtype": torch.float32}
halves = pytest.mark.parametrize("half", HALVES, ids=str)
masters = pytest.mark.parametrize(
    "formats", [EXACT, IN_24_BITS], ids=lambda it: it["master_weights"]
)


def by_reference(cls, params, **kwargs):
    return cls(params, backend="reference", **kwargs)


def numbers(step: int) -> Iterator[torch.Tensor]:
    """Every step-th float32 by its bits, in slices; and those around every 16-bit number."""
    size = 2**24  # all numbers at once would not fit in memory
    for first in range(-(2**31), 2**31, size):
        yield torch.arange(first, first + size, step).to(torch.int32).view(torch.float32)
    near = (torch.arange(2**16) << 16)[:, None] + torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, -1])
    yield near.flatten().to(torch.int32).view(torch.float32)


@halves
def test_split_and_join_restore_every_number(half):
    """FUSEDOPT_EXHAUSTIVE=1 tries all 2**32, which takes more than 5 minutes."""
    step = 1 if os.environ.get("FUSEDOPT_EXHAUSTIVE") else 4099
    tried = 0
    for values in numbers(step):
        number, rest = split(values, half)
        restored = join(number, rest)
        expected = values
        if half == torch.float16:
            tiny = values.abs() < 2.0**-17
            expected = torch.where(tiny, (values.double() * 2.0**40).round() * 2.0**-40, values)
            expected = torch.where(values.abs() >= 2.0**16, values * torch.inf, expected).float()
        same = (restored == expected) | (restored.isnan() & values.isnan())
        assert same.all()
        finite = restored.isfinite()
        # The number is one of the two nearest: at most half a unit away, ties away from zero.
        error = (number.double() - restored.double()).abs()[finite & number.isfinite()]
        unit = (restored.to(half).double() - restored.double()).abs()[finite & number.isfinite()]
        assert (error == unit).all()
        tried += values.numel()
    assert tried >= 2**32 // step


@halves
def test_split_and_join_restore_every_number_of_24_bits(half):
    """All 2**24."""
    for first in range(-(2**23), 2**23, 2**21):
        bits = torch.arange(first, first + 2**21) << 8
        number = (bits >> 16).to(torch.int16).view(half)
        values = join(number, (bits & 0xFFFF).to(torch.int16))
        number, rest = split(values, half, torch.int8)
        restored = join(number, rest)
        assert rest.dtype == torch.int8
        assert ((restored == values) | (restored.isnan() & values.isnan())).all()


@halves
def test_masters_of_24_bits_are_rounded_to_nearest_even(half):
    """In the unit of the last of their 24 bits."""
    for values in numbers(65537):
        values = values[~values.isnan()]
        bits = extended(values, half)
        found = extended(join(*split(values, half, torch.int8)), half)
        assert torch.equal(found, (bits.double() / 256).round().long() * 256)


def test_a_rest_of_other_bits_is_converted():
    """From 8 to 16 bits without a change; from 16 to 8 the number that it belongs to stays."""
    short = torch.arange(-(2**7), 2**7).to(torch.int8)
    assert torch.equal(convert_rest(short, torch.int16), short.short() * 256)
    assert torch.equal(convert_rest(convert_rest(short, torch.int16), torch.int8), short)
    long = torch.arange(-(2**15), 2**15).to(torch.int16)
    error = convert_rest(convert_rest(long, torch.int8), torch.int16).int() - long.int()
    assert error[: -(2**7)].abs().max() == 128 and error.abs().max() == 255


@halves
@pytest.mark.parametrize("rest_dtype", [torch.int16, torch.int8], ids=str)
def test_a_number_that_somebody_changed_counts(half, rest_dtype):
    """Whatever the rest is, a joined number is within one unit of the 16-bit one."""
    number = torch.arange(-(2**15), 2**15).to(torch.int16).view(half)
    info = torch.iinfo(rest_dtype)
    for rest in (info.min, -1, 0, 1, info.max):
        rests = torch.full(number.shape, rest, dtype=rest_dtype)
        joined = join(number, rests)
        assert torch.equal(joined.isnan(), number.isnan())
        finite = number.isfinite()
        above = (number.abs().view(torch.int16) + 1).view(half)
        unit = (above.double() - number.abs().double())[finite & above.isfinite()]
        error = (joined.double() - number.double()).abs()[finite & above.isfinite()]
        assert (error <= unit).all()
    zero = torch.zeros(2, dtype=half) * torch.tensor([1, -1])
    assert (join(zero, torch.tensor([-5, -5], dtype=torch.int16)) == 0).all()


@halves
@masters
def test_kernels_split_and_join_every_16_bit_number(backend, half, formats):
    """SGD without a gradient's share leaves each number as it was, and joins what is there."""
    number = torch.arange(-(2**15), 2**15).to(torch.int16).view(half)
    number = number[~number.isnan()].to(backend.device)
    results = []
    for make in (backend.make, by_reference):
        param = number.clone().requires_grad_()
        optimizer = make(fusedopt.FusedSGD, [param], lr=0.0, **formats)
        param.grad = torch.zeros_like(param)
        optimizer.step()
        generator = torch.Generator().manual_seed(0)
        rest = optimizer.state[param]["param_rest"]
        info = torch.iinfo(rest.dtype)
        rest.copy_(torch.randint(info.min, info.max + 1, rest.shape, generator=generator))
        optimizer.step()
        results.append(tensors_of(optimizer))
    assert_same_bits(*results)


@pytest.mark.parametrize("case", CASES, ids=str)
@halves
def test_exact_masters_train_as_float32(backend, case, half):
    """The weights of a float32 optimizer with the same gradients, to the bit."""
    shapes = [(3, 555), (33333,)]
    params = make_params(shapes, half, backend.device)
    options = {"max_grad_norm": 1.0, **case.kwargs}
    fused = backend.make(
        case.cls, params, master_weights="exact", state_dtype=torch.float32, **options
    )
    wide = [p.detach().float().requires_grad_() for p in params]
    expected = by_reference(case.cls, wide, **options)
    for seed in range(5):
        set_grads(params, seed)
        for param, master in zip(params, wide):
            master.grad = param.grad.float()
        fused.step()
        # The norm is summed in lanes by the size of a parameter's elements.
        expected.max_grad_norm = 1.0
        expected.step()
        masters = fusedopt.master_weights(fused)
        for index, master in enumerate(wide):
            found = masters[f"parameter {index} of param group 0"]
            if half == torch.float16:  # smaller ones are rounded to a multiple of 2**-40
                found, master = (
                    torch.where(it.abs() < 2**-17, 0, it.detach()) for it in (found, master)
                )
            assert torch.equal(found.cpu(), master.detach().cpu())


@pytest.mark.parametrize("case", CLASSES, ids=str)
@pytest.mark.parametrize(
    "formats",
    [
        EXACT,
        IN_24_BITS,
        {"master_weights": "exact", "state_dtype": torch.bfloat16},
        {"state_dtype": torch.bfloat16},
    ],
    ids=str,
)
def test_two_steps_and_two_resumed_ones_are_four(backend, case, formats):
    shapes = [(3, 555), (17000,)]
    whole, first = (
        backend.make(
            case.cls,
            make_params(shapes, torch.bfloat16, backend.device),
            **formats,
            **case.kwargs,
        )
        for _ in range(2)
    )
    for seed in range(2):
        for optimizer in (whole, first):
            set_grads(optimizer.param_groups[0]["params"], seed)
            optimizer.step()
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    saved = torch.load(file)
    params = [p.detach().clone().requires_grad_() for p in first.param_groups[0]["params"]]
    second = backend.make(case.cls, params, **formats, **case.kwargs)
    second.load_state_dict(saved)
    for seed in range(2, 4):
        for optimizer in (whole, second):
            set_grads(optimizer.param_groups[0]["params"], seed)
            optimizer.step()
    assert_same_bits(tensors_of(second), tensors_of(whole))


def test_formats_are_not_taken_from_a_checkpoint():
    def take_step(**formats):
        params = make_params([(70,)], torch.bfloat16)
        optimizer = by_reference(fusedopt.FusedAdam, params, **formats)
        set_grads(params, 0)
        optimizer.step()
        return optimizer

    exact, naive = take_step(**EXACT, seed=3), take_step()
    saved, plain = copy.deepcopy(exact.state_dict()), copy.deepcopy(naive.state_dict())
    naive.load_state_dict(saved)
    assert "master_weights" not in naive.param_groups[0]
    state = next(iter(naive.state.values()))
    assert "param_rest" not in state  # there is no master that it could belong to
    exact.load_state_dict(plain)
    assert exact.param_groups[0]["master_weights"] == "exact"
    assert exact.param_groups[0]["seed"] == 3
    state = next(iter(exact.state.values()))
    assert state["exp_avg"].dtype == torch.float32
    set_grads(exact.param_groups[0]["params"], 1)
    exact.step()  # the master begins with the 16-bit weights
    assert state["param_rest"].dtype == torch.int16


@halves
def test_masters_of_24_bits_and_exact_ones_are_converted(backend, half):
    """In a checkpoint, and between steps. The weights that the model has stay as they are."""
    params = make_params([(700,)], half, backend.device)
    optimizer = backend.make(fusedopt.FusedAdam, params, **EXACT)
    set_grads(params, 0)
    optimizer.step()
    (exact,) = fusedopt.master_weights(optimizer).values()

    others = [params[0].detach().clone().requires_grad_()]
    other = backend.make(fusedopt.FusedAdam, others, **IN_24_BITS)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.state[others[0]]["param_rest"].dtype == torch.int8
    (found,) = fusedopt.master_weights(other).values()
    near = exact.abs() > 2.0**-10
    assert ((found - exact)[near].abs() <= exact[near].abs() * 2.0**-15).all()

    optimizer.param_groups[0].update(IN_24_BITS)
    for it in (optimizer, other):
        set_grads(it.param_groups[0]["params"], 1)
        it.step()
    assert_same_bits(tensors_of(optimizer), tensors_of(other))
    (before,) = fusedopt.master_weights(optimizer).values()

    back = backend.make(fusedopt.FusedAdam, [params[0].detach().clone().requires_grad_()], **EXACT)
    back.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    (after,) = fusedopt.master_weights(back).values()
    assert torch.equal(before, after)


def test_a_rest_of_another_dtype_is_refused():
    params = make_params([(3,)], torch.bfloat16)
    optimizer = by_reference(fusedopt.FusedAdam, [("w", params[0])], **IN_24_BITS)
    set_grads(params, 0)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["param_rest"] = saved["state"][0]["param_rest"].float()
    with pytest.raises(TypeError, match=r"'param_rest' of .*'w'.* is torch.float32; expected"):
        optimizer.load_state_dict(saved)


@halves
@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_checkpoints_of_torch_are_loaded(backend, case, half):
    wide = make_params([(3, 55)])
    theirs = case.twin(wide, **case.kwargs)
    set_grads(wide, 0)
    theirs.step()
    params = [p.detach().to(backend.device, half).requires_grad_() for p in wide]
    ours = backend.make(case.cls, params, **EXACT, **case.kwargs)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    reference = by_reference(case.cls, copy.deepcopy(params), **EXACT, **case.kwargs)
    reference.load_state_dict(copy.deepcopy(theirs.state_dict()))
    for optimizer in (ours, reference):
        set_grads(optimizer.param_groups[0]["params"], 1)
        optimizer.step()
    assert_same_bits(tensors_of(ours), tensors_of(reference))
    for value in ours.state[params[0]].values():
        assert value.dtype in (torch.float32, torch.int16)


def test_formats_may_change_between_steps(backend):
    params = make_params([(700,)], torch.bfloat16, backend.device)
    optimizer = backend.make(fusedopt.FusedAdam, params)
    dtypes = []
    for formats in ({}, EXACT, {"state_dtype": torch.bfloat16}, {"master_weights": None}):
        optimizer.param_groups[0].update(formats)
        set_grads(params, 0)
        optimizer.step()
        state = optimizer.state[params[0]]
        dtypes.append((state["exp_avg"].dtype, "param_rest" in state))
    wide, narrow = torch.float32, torch.bfloat16
    assert dtypes == [(narrow, False), (wide, True), (narrow, True), (narrow, False)]


def test_an_overflow_in_the_first_step_leaves_no_state(backend):
    params = make_params([(70,)], torch.bfloat16, backend.device)
    optimizer = backend.make(fusedopt.FusedSGD, params, nonfinite="skip", **EXACT)
    before = snapshot(optimizer)
    set_grads(params, 0)
    params[0].grad[0] = torch.nan
    optimizer.step()
    assert optimizer.step_skipped
    assert_same_bits(tensors_of(optimizer), before)
    assert optimizer.state_dict()["state"] == {}


REFUSED = [
    ({"master_weights": "float32"}, torch.bfloat16, "Invalid master_weights value: 'float32'"),
    ({"state_dtype": torch.float16}, torch.bfloat16, "Invalid state_dtype value: torch.float16"),
    ({"state_dtype": "bfloat16"}, torch.bfloat16, "Invalid state_dtype value: 'bfloat16'"),
    ({"rounding": "down"}, torch.bfloat16, "Invalid rounding value: 'down'"),
    ({"seed": -1}, torch.bfloat16, "Invalid seed value: -1"),
    ({"seed": 1.5}, torch.bfloat16, "seed is a float"),
    (EXACT, torch.float64, "'w'.* is torch.float64, and its group has master_weights='exact'"),
    ({"state_dtype": torch.bfloat16}, torch.float64, "'w'.* is torch.float64"),
    ({"rounding": "stochastic"}, torch.float16, "'w'.* is torch.float16, and rounding="),
]


@pytest.mark.parametrize(("formats", "dtype", "message"), REFUSED, ids=lambda it: str(it)[:40])
def test_refusals(formats, dtype, message):
    param = torch.nn.Parameter(torch.ones(3, dtype=dtype))
    with pytest.raises((TypeError, ValueError), match=message):
        fusedopt.FusedAdam([("w", param)], **formats)
    optimizer = fusedopt.FusedAdam([("w", param)], backend="reference")
    optimizer.param_groups[0].update(formats)
    param.grad = torch.ones_like(param)
    before = snapshot(optimizer)
    with pytest.raises((TypeError, ValueError), match=message.replace("Invalid ", "Invalid .*")):
        optimizer.step()
    assert_same_bits(snapshot(optimizer), before)


def test_formats_are_no_attributes():
    optimizer = fusedopt.FusedAdam(make_params([(3,)]))
    for name in ("master_weights", "state_dtype", "rounding", "seed"):
        with pytest.raises(AttributeError, match=f"{name} is an argument of FusedAdam"):
            setattr(optimizer, name, None)


def test_master_weights_by_name():
    layer = torch.nn.Linear(3, 2).bfloat16()
    optimizer = fusedopt.FusedAdam(layer.named_parameters(), **EXACT, backend="reference")
    found = fusedopt.master_weights(optimizer)
    assert list(found) == ["weight", "bias"]
    assert torch.equal(found["weight"], layer.weight.detach().float())
    with pytest.raises(TypeError, match="master_weights was given a SGD"):
        fusedopt.master_weights(torch.optim.SGD(layer.parameters()))


@pytest.mark.parametrize("formats", [{}, {"master_weights": "exact"}, {"rounding": "stochastic"}])
def test_naive_parameters_are_mentioned_once(formats, caplog, monkeypatch):
    monkeypatch.setattr(check_formats, "_has_warned", False)
    with caplog.at_level(logging.WARNING, "fusedopt"):
        for _ in range(2):
            params = make_params([(3,)], torch.bfloat16)
            optimizer = fusedopt.FusedAdam(params, **formats, backend="reference")
            set_grads(params, 0)
            optimizer.step()
    assert len(caplog.records) == (0 if formats else 1)
