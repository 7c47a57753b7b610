"""Clipping alone, by the three functions of torch.nn.utils: their numbers."""

from __future__ import annotations

import inspect
import math
import re

import pytest
import torch
from cases import DTYPES, INTEGER_OF, SHAPES, assert_same_bits, make_params, same_bits, set_grads
from clipped import (
    FUSED_NORM_TYPES,
    NORM_TYPES,
    NOT_EMPTY,
    by_name,
    clip,
    grads_of,
    in_float64,
    mixed,
    named,
    norm64,
    with_grad,
    with_grads,
)
from hypothesis import given
from hypothesis import strategies as st
from test_properties import LAYOUTS, SETTINGS, lay_out
from test_properties import SHAPES as DRAWN_SHAPES
from torch.nn import Parameter

import fusedopt

NAMES = ["clip_grad_norm_", "get_total_norm", "clip_grads_with_norm_"]


# Against torch.


@pytest.mark.parametrize("name", NAMES)
def test_signatures_are_those_of_torch(name):
    ours = inspect.signature(getattr(fusedopt, name)).parameters
    theirs = inspect.signature(getattr(torch.nn.utils, name)).parameters
    beyond = (
        ["backend"] if name == "clip_grads_with_norm_" else ["backend", "process_group", "plain"]
    )
    assert [*ours] == [*theirs, *beyond]
    for key, parameter in theirs.items():
        assert (ours[key].kind, ours[key].default) == (parameter.kind, parameter.default)
    assert ours["backend"].kind is inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_as_torch(backend, norm_type, foreach):
    for dtype in (torch.float32, torch.float64):
        for max_norm in (1e-3, 0.7, 1e6, 0.0, -1.0):
            ours = with_grads(NOT_EMPTY, dtype, backend.device)
            ours[1].grad = None
            theirs = in_float64(ours)
            norm = clip(backend, ours, max_norm, norm_type, foreach=foreach)
            expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm, norm_type)
            torch.testing.assert_close(norm, expected.to(dtype))
            torch.testing.assert_close(by_name(ours), by_name(theirs), check_dtype=False)


@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_the_two_halves_as_torch(backend, norm_type):
    ours = with_grads(NOT_EMPTY, device=backend.device)
    theirs = in_float64(ours)
    expected = torch.nn.utils.get_total_norm(grads_of(theirs), norm_type)
    norm = fusedopt.get_total_norm(grads_of(ours), norm_type, backend=named(backend))
    torch.testing.assert_close(norm, expected.float())
    assert_same_bits(by_name(ours), by_name(with_grads(NOT_EMPTY, device=backend.device)))
    torch.nn.utils.clip_grads_with_norm_(theirs, 0.3, expected)
    assert fusedopt.clip_grads_with_norm_(ours, 0.3, norm, backend=named(backend)) is None
    torch.testing.assert_close(by_name(ours), by_name(theirs), check_dtype=False)


@pytest.mark.parametrize("norm_type", [2.0, math.inf, 1.0])
def test_mixed_dtypes_as_torch_in_float64(backend, norm_type):
    ours = mixed(backend.device)
    theirs = in_float64(ours)
    norm = clip(backend, ours, 0.5, norm_type)
    expected = torch.nn.utils.clip_grad_norm_(theirs, 0.5, norm_type)
    assert norm.dtype == torch.float64
    torch.testing.assert_close(norm, expected, rtol=1e-7, atol=0)
    for param, other in zip(ours, theirs):
        torch.testing.assert_close(param.grad, other.grad.to(param.dtype))


@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 100.0])
def test_a_stock_optimizer_trains_as_with_torch(backend, max_norm):
    trained = []
    for function in (fusedopt.clip_grad_norm_, torch.nn.utils.clip_grad_norm_):
        params = make_params(NOT_EMPTY, torch.float64, backend.device)
        optimizer = torch.optim.AdamW(params, lr=0.1, weight_decay=0.1, foreach=False)
        kwargs = {"backend": named(backend)} if function is fusedopt.clip_grad_norm_ else {}
        for seed in range(4):
            set_grads(params, seed)
            function(params, max_norm, **kwargs)
            optimizer.step()
        trained.append(params)
    for ours, theirs in zip(*trained):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bits_are_those_of_clipping_inside_the_step(backend, dtype):
    inside, outside = (make_params(SHAPES, dtype, backend.device) for _ in range(2))
    clipping = backend.make(fusedopt.FusedAdamW, inside, max_grad_norm=0.5)
    plain = backend.make(fusedopt.FusedAdamW, outside)
    for seed in range(3):
        set_grads(inside, seed)
        set_grads(outside, seed)
        clipping.step()
        norm = clip(backend, outside, 0.5)
        plain.step()
        assert norm.item() == pytest.approx(clipping.grad_norm.item(), rel=2.0**-23)
        for a, b in zip(inside, outside):
            assert same_bits(a, b)


# Against the reference, to the bit.


@pytest.mark.racecheck
@pytest.mark.parametrize("norm_type", FUSED_NORM_TYPES)
@pytest.mark.parametrize("max_norm", [0.01, 1.0, 1e9, math.inf])
@pytest.mark.parametrize("dtype", [*DTYPES, None], ids=str)
def test_same_bits_as_the_reference(backend, dtype, max_norm, norm_type):
    fused, reference = (
        mixed(backend.device) if dtype is None else with_grads(SHAPES, dtype, backend.device)
        for _ in range(2)
    )
    norm = clip(backend, fused, max_norm, norm_type)
    expected = fusedopt.clip_grad_norm_(reference, max_norm, norm_type, backend="reference")
    assert_same_bits({"norm": norm, **by_name(fused)}, {"norm": expected, **by_name(reference)})


@st.composite
def calls(draw):
    """Gradients' shapes, dtypes and layouts (None: no gradient), values, and arguments."""
    layouts = st.one_of(st.none(), LAYOUTS, LAYOUTS, LAYOUTS, LAYOUTS)
    grads = st.lists(st.tuples(DRAWN_SHAPES, st.sampled_from(DTYPES), layouts), max_size=6)
    return (
        draw(grads),
        draw(st.sampled_from([1e-30, 1e-3, 1.0, 300.0, 1e30])),
        draw(st.sampled_from([None, None, None, math.inf, -math.inf, math.nan])),
        draw(st.sampled_from([0.0, 1e-3, 1.0, 50.0, -1.0, math.inf, math.nan])),
        draw(st.sampled_from([2.0, 2.0, math.inf, math.inf, 1.0])),
        draw(st.booleans()),
    )


def make_call(call, device):
    grads, scale, planted, *_ = call
    generator = torch.Generator().manual_seed(0)
    params = []
    for shape, dtype, layout in grads:
        values = torch.randn(shape, generator=generator) * scale
        if planted is not None and values.numel() > 0:
            values.view(-1)[values.numel() // 2] = planted
        param = Parameter(torch.zeros(shape, dtype=dtype, device=device))
        param.grad = None if layout is None else lay_out(values.to(device, dtype), layout)
        params.append(param)
    return params


@SETTINGS
@given(call=calls())
def test_same_bits_as_the_reference_whatever_is_drawn(backend, call):
    *_, max_norm, norm_type, error_if_nonfinite = call
    outcomes = []
    for name in (named(backend), "reference"):
        params = make_call(call, backend.device)
        found = by_name(params)
        try:
            found["norm"] = fusedopt.clip_grad_norm_(
                params, max_norm, norm_type, error_if_nonfinite, backend=name
            )
        except RuntimeError:  # it says what is tested elsewhere; here, that nothing was changed
            assert_same_bits(found, by_name(make_call(call, backend.device)))
        outcomes.append(found)
    assert_same_bits(*outcomes)


@pytest.mark.parametrize("norm_type", FUSED_NORM_TYPES)
def test_bits_do_not_depend_on_the_number_of_threads(backend, norm_type):
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        params = with_grads([(0,), (33333,), (5,), (230000,)], device=backend.device)
        norm = clip(backend, params, 0.5, norm_type)
        results.append({"norm": norm, **by_name(params)})
    for result in results[1:]:
        assert_same_bits(result, results[0])


@pytest.mark.parametrize("tensors", [450, 4100])
@pytest.mark.parametrize("norm_type", FUSED_NORM_TYPES)
def test_many_tensors(backend, tensors, norm_type):
    fused, twin = (with_grads([(7,)] * tensors, device=backend.device) for _ in range(2))
    norm = clip(backend, fused, 1.0, norm_type)
    expected = fusedopt.clip_grad_norm_(twin, 1.0, norm_type, backend="reference")
    assert_same_bits({"norm": norm, **by_name(fused)}, {"norm": expected, **by_name(twin)})
    fusedopt.clip_grads_with_norm_(fused, 0.1, 1.0, backend=named(backend))
    fusedopt.clip_grads_with_norm_(twin, 0.1, 1.0, backend="reference")
    assert_same_bits(by_name(fused), by_name(twin))


def test_more_than_a_million_elements(backend):
    """Long enough for other Python threads to run meanwhile."""
    fused, twin = (with_grads([(1100, 1000), (3,)], device=backend.device) for _ in range(2))
    norm = clip(backend, fused, 1.0)
    expected = fusedopt.clip_grad_norm_(twin, 1.0, backend="reference")
    assert_same_bits({"norm": norm, **by_name(fused)}, {"norm": expected, **by_name(twin)})


# Numbers.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_have_the_true_norm(backend, dtype):
    """Of float16 torch's norm overflows here, and of bfloat16 it has 8 bits."""
    params = with_grads([(3000,), (555,)], dtype, backend.device, scale=2000.0)
    true = norm64(params)
    before = [p.grad.double() for p in params]
    norm = clip(backend, params, 1.0)
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(true, rel=2.0**-23)
    unit = torch.finfo(dtype).eps / 2
    for param, old in zip(params, before):
        expected = old / (true + 1e-6)
        smallest = torch.finfo(dtype).smallest_normal * unit
        torch.testing.assert_close(
            param.grad.double(), expected, rtol=unit * 1.001, atol=smallest * 1.001
        )


@pytest.mark.parametrize("norm_type", [2.0, math.inf, 1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_gradients_near_the_largest_float32_are_clipped(backend, dtype, norm_type):
    params = [with_grad([3e38] * 400, dtype, backend.device) for _ in range(2)]
    norm = clip(backend, params, 1.0, norm_type)
    size = {2.0: 800**0.5, math.inf: 1.0, 1.0: 800.0, 3.0: 800 ** (1 / 3)}[norm_type]
    expected = torch.tensor(3e38 * size, dtype=torch.float64).to(norm.dtype).item()
    assert norm.item() == pytest.approx(expected, rel=1e-2)
    for param in params:
        torch.testing.assert_close(
            param.grad, torch.full_like(param.grad, 1 / size), rtol=1e-2, atol=0
        )


@pytest.mark.parametrize("error_if_nonfinite", [False, True])
def test_a_norm_that_only_float32_cannot_hold_is_no_error(backend, error_if_nonfinite):
    param = with_grad([3e38] * 4, device=backend.device)
    assert clip(backend, [param], 1.0, error_if_nonfinite=error_if_nonfinite) == math.inf
    torch.testing.assert_close(param.grad, torch.full_like(param.grad, 0.5))


@pytest.mark.parametrize("norm_type", FUSED_NORM_TYPES)
@pytest.mark.parametrize("value", [1e-30, 1e-40, 1e-45])
def test_tiny_gradients_do_not_vanish(backend, value, norm_type):
    params = [with_grad([value] * 16, device=backend.device)]
    value = params[0].grad[0].item()
    expected = value if norm_type == math.inf else 4 * value
    assert clip(backend, params, 1.0, norm_type).item() == expected


def test_the_coefficient_is_the_limit_over_the_norm_plus_1e_6(backend):
    param = with_grad([3e-6], torch.float64, backend.device)
    clip(backend, [param], 5e-7)
    assert param.grad.item() == pytest.approx(3e-6 * (5e-7 / (3e-6 + 1e-6)), rel=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_below_the_limit_nothing_is_written(backend, dtype):
    """Not even a nan's payload, which a multiplication by one would set its quiet bit in."""
    params = with_grads(SHAPES, dtype, backend.device)
    params[4].grad[7] = torch.nan
    before = [p.grad.clone() for p in params]
    integer = INTEGER_OF[params[4].element_size()]
    signaling = params[4].grad.view(integer)
    signaling[7] = torch.tensor(math.inf, dtype=dtype).view(integer).item() + 1
    before[4].view(integer)[7] = signaling[7]
    clip(backend, params, math.inf)
    fusedopt.clip_grads_with_norm_(params, 2.0, 1.0, backend=named(backend))
    for param, old in zip(params, before):
        assert torch.equal(param.grad.view(integer), old.view(integer))


@pytest.mark.parametrize("norm_type", [2.0, math.inf, 1.0])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_nonfinite_gradients_as_torch(backend, value, norm_type):
    results = []
    for function in (fusedopt.clip_grad_norm_, torch.nn.utils.clip_grad_norm_):
        params = with_grads([(3,), (700,), (16385,)], device=backend.device)
        params[1].grad[600] = value
        kwargs = {"backend": named(backend)} if function is fusedopt.clip_grad_norm_ else {}
        norm = function(params, 1.0, norm_type, **kwargs)
        results.append({"norm": norm, **by_name(params)})
    assert_same_bits(*results)


@pytest.mark.parametrize("where", [0, 254, 255, 1023, 1024, 16383, 16384, 20000])
def test_one_nan_is_found_wherever_it_is(backend, where):
    param = Parameter(torch.zeros(20001, device=backend.device))
    param.grad = torch.full_like(param, 5.0)
    param.grad[where] = math.nan
    for norm_type in FUSED_NORM_TYPES:
        assert clip(backend, [param], math.inf, norm_type).isnan()


@pytest.mark.parametrize("norm_type", [2.0, math.inf, 1.0, 0.5])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_error_if_nonfinite_is_that_of_torch_and_nothing_is_written(backend, value, norm_type):
    params = with_grads([(3,), (700,)], device=backend.device)
    params[1].grad[600] = value
    before = {name: grad.clone() for name, grad in by_name(params).items()}
    with pytest.raises(RuntimeError) as expected:
        torch.nn.utils.clip_grad_norm_(params, 1.0, norm_type, error_if_nonfinite=True)
    with pytest.raises(RuntimeError, match=re.escape(str(expected.value))):
        clip(backend, params, 1.0, norm_type, error_if_nonfinite=True)
    with pytest.raises(RuntimeError, match=re.escape(str(expected.value))):
        fusedopt.get_total_norm(grads_of(params), norm_type, True, backend=named(backend))
    assert_same_bits(by_name(params), before)


def test_infinite_limit_measures_and_changes_nothing(backend):
    for value in (1e30, math.inf, math.nan):
        param = with_grad([1.0, value, -3.0], device=backend.device)
        before, version = param.grad.clone(), param.grad._version
        norm = clip(backend, [param], math.inf)
        assert same_bits(norm, before.double().norm().float())
        assert same_bits(param.grad, before) and param.grad._version == version
