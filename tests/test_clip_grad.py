"""Clipping by itself: torch.nn.utils' three functions, for any optimizer."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
import re

import pytest
import torch
from cases import DTYPES, INTEGER_OF, SHAPES, assert_same_bits, make_params, same_bits, set_grads
from hypothesis import given
from hypothesis import strategies as st
from test_properties import LAYOUTS, SETTINGS, lay_out
from test_properties import SHAPES as DRAWN_SHAPES
from torch.nn import Parameter

import fusedopt
from fusedopt import backends

NAMES = ["clip_grad_norm_", "get_total_norm", "clip_grads_with_norm_"]
FUSED_NORM_TYPES = [2.0, math.inf]
NORM_TYPES = [*FUSED_NORM_TYPES, 1.0, 3.0, 0.5, 0.0, -1.0, -math.inf, 1, "inf"]
NOT_EMPTY = [(3,), (), (555,), (16385,), (2, 33, 41)]


def grads_of(params):
    return [p.grad for p in params if p.grad is not None]


def by_name(params):
    return {f"grad {i}": p.grad for i, p in enumerate(params) if p.grad is not None}


def named(backend):
    return "cpu" if backend.name == "cpu" else "cuda"


def clip(backend, params, *args, **kwargs):
    return fusedopt.clip_grad_norm_(params, *args, backend=named(backend), **kwargs)


def with_grads(shapes, dtype=torch.float32, device="cpu", scale=1.0, seed=0):
    params = make_params(shapes, dtype, device)
    set_grads(params, seed, scale)
    return params


def with_grad(values, dtype=torch.float32, device="cpu"):
    param = Parameter(torch.zeros(len(values), dtype=dtype, device=device))
    param.grad = torch.tensor(values, dtype=dtype, device=device)
    return param


def in_float64(params):
    """The same, each on its own memory."""
    twins = [Parameter(param.detach().to(torch.float64, copy=True)) for param in params]
    for twin, param in zip(twins, params):
        twin.grad = None if param.grad is None else param.grad.to(torch.float64, copy=True)
    return twins


def mixed(device, scale=1.0):
    return [
        param
        for seed, dtype in enumerate(DTYPES)
        for param in with_grads([(33,), (), (20000,), (5, 7)], dtype, device, scale, seed)
    ]


def norm64(params):
    return math.sqrt(sum(g.double().square().sum().item() for g in grads_of(params)))


# Against torch.


@pytest.mark.parametrize("name", NAMES)
def test_signatures_are_those_of_torch(name):
    ours = inspect.signature(getattr(fusedopt, name)).parameters
    theirs = inspect.signature(getattr(torch.nn.utils, name)).parameters
    assert [*ours] == [*theirs, "backend"]
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
    torch.testing.assert_close(norm, expected, rtol=1e-12, atol=0)
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


# What is given, and what comes back.


@pytest.mark.parametrize("norm_type", [2.0, math.inf, 1.0])
def test_what_comes_back(backend, norm_type):
    for dtype in DTYPES:
        params = with_grads([(3,), (0,)], dtype, backend.device)
        norm = clip(backend, params, 1.0, norm_type)
        expected = torch.float64 if dtype == torch.float64 else torch.float32
        assert (norm.dtype, norm.shape, norm.device) == (expected, (), params[0].device)
        assert not norm.requires_grad and norm.is_leaf
        assert same_bits(pickle.loads(pickle.dumps(norm)), copy.deepcopy(norm))


@pytest.mark.parametrize("norm_type", [2.0, math.inf, 1.0])
@pytest.mark.parametrize("empty", [list, tuple, dict, set, lambda: iter([])])
def test_no_parameters(empty, norm_type):
    zero = torch.tensor(0.0)
    assert same_bits(fusedopt.clip_grad_norm_(empty(), 1.0, norm_type), zero)
    assert same_bits(fusedopt.get_total_norm(empty(), norm_type), zero)
    assert fusedopt.clip_grads_with_norm_(empty(), 1.0, 1.0) is None


def test_an_empty_generator_is_warned_of_as_torch_does():
    nothing: list[Parameter] = []
    with pytest.warns(UserWarning, match="empty generator") as expected:
        torch.nn.utils.clip_grad_norm_((p for p in nothing), 1.0)
    with pytest.warns(UserWarning, match=re.escape(str(expected[0].message))) as found:
        norm = fusedopt.clip_grad_norm_((p for p in nothing), 1.0)
    assert found[0].filename == __file__
    assert same_bits(norm, torch.tensor(0.0))


@pytest.mark.parametrize("norm_type", [2.0, math.inf, 1.0])
def test_parameters_without_gradients(backend, norm_type):
    params = make_params([(3,), (4,)], device=backend.device)
    assert same_bits(clip(backend, params, 1.0, norm_type), torch.tensor(0.0))
    fusedopt.clip_grads_with_norm_(params, 1.0, 3.0, backend=named(backend))
    assert all(p.grad is None for p in params)
    params[1].grad = torch.full_like(params[1], 2.0)
    assert clip(backend, params, 1.0, math.inf) == 2.0


@pytest.mark.parametrize("norm_type", [2.0, math.inf, 1.0, 0.0])
def test_empty_gradients_count_as_zeros(backend, norm_type):
    params = with_grads([(0,), (0, 4)], device=backend.device)
    assert clip(backend, params, 1.0, norm_type) == 0.0
    params.insert(1, with_grad([3.0], device=backend.device))
    expected = 1.0 if norm_type == 0.0 else 3.0
    assert clip(backend, params, math.inf, norm_type) == expected


def test_one_tensor_and_any_iterable(backend):
    def fresh():
        return [with_grad([3.0], device=backend.device), with_grad([4.0], device=backend.device)]

    assert clip(backend, fresh()[0], 1.0) == 3.0
    for iterable in (tuple, set, iter, dict.fromkeys, lambda params: (p for p in params)):
        params = fresh()
        assert clip(backend, iterable(params), 1.0) == 5.0
        assert params[0].grad.item() == pytest.approx(0.6, rel=1e-6)
        assert fusedopt.get_total_norm(iterable(grads_of(params)), backend=named(backend)) < 1.0
        fusedopt.clip_grads_with_norm_(iterable(params), 1.0, 2.0, backend=named(backend))
        assert params[1].grad.item() == pytest.approx(0.4, rel=1e-6)


def test_limit_and_order_are_taken_as_torch_takes_them(backend):
    for max_norm in (2, "2.0", torch.tensor(2.0), True):
        param = with_grad([4.0], device=backend.device)
        clip(backend, param, max_norm, "2")
        assert param.grad.item() == pytest.approx(float(max_norm), rel=1e-6)
    with pytest.raises(ValueError, match="could not convert string to float"):
        clip(backend, param, 1.0, "two")


@pytest.mark.parametrize(
    "total_norm",
    [
        4.0,
        4,
        torch.tensor(4.0),
        torch.tensor([[4.0]], dtype=torch.float64),
        torch.tensor(4.0, dtype=torch.bfloat16, requires_grad=True),
        torch.tensor(4),
    ],
    ids=str,
)
def test_total_norm_is_a_number_or_a_tensor_of_one(backend, total_norm):
    for name in (named(backend), "reference"):
        params = with_grads([(3,), (555,)], torch.float64, backend.device)
        before = [p.grad.clone() for p in params]
        fusedopt.clip_grads_with_norm_(params, 2.0, total_norm, backend=name)
        for param, old in zip(params, before):
            torch.testing.assert_close(param.grad, old * (2 / (4 + 1e-6)), rtol=1e-15, atol=0)


def test_total_norm_on_the_device_is_not_copied_by_way_of_the_host(backend):
    param = with_grad([3.0], device=backend.device)
    norm = torch.tensor(4.0, device=backend.device)
    fusedopt.clip_grads_with_norm_(param, 2.0, norm, backend=named(backend))
    assert param.grad.item() == pytest.approx(1.5, rel=1e-6)
    with pytest.raises(ValueError, match=r"total_norm has shape \(2,\); expected .* one element"):
        fusedopt.clip_grads_with_norm_(param, 2.0, torch.ones(2), backend=named(backend))


@pytest.mark.parametrize("value", [math.inf, math.nan, 0.0, 0.5])
def test_scaling_by_any_norm_as_torch(backend, value):
    ours, theirs = (with_grads([(3,), (555,)], device=backend.device) for _ in range(2))
    norm = torch.tensor(value, device=backend.device)
    fusedopt.clip_grads_with_norm_(ours, 1.0, norm, backend=named(backend))
    torch.nn.utils.clip_grads_with_norm_(theirs, 1.0, norm)
    assert_same_bits(by_name(ours), by_name(theirs))


@pytest.mark.parametrize("norm_type", [2.0, math.inf, 1.0])
def test_a_gradient_listed_twice_counts_twice_and_is_scaled_once(backend, norm_type):
    """torch scales it twice, by the square of its own formula's coefficient."""
    for name in (named(backend), "reference"):
        a, b = with_grads([(555,), (3, 4)], device=backend.device)
        c = Parameter(torch.zeros_like(b.t()))
        c.grad = b.grad.t()  # the same memory under another parameter
        before = [p.grad.clone() for p in (a, b)]
        expected = torch.nn.utils.get_total_norm([g for g in before for _ in range(2)], norm_type)
        norm = fusedopt.clip_grad_norm_([a, b, a, c], 0.5, norm_type, backend=name)
        torch.testing.assert_close(norm, expected)
        for param, old in zip((a, b), before):
            torch.testing.assert_close(param.grad, old * (0.5 / (expected + 1e-6)))


def test_gradients_of_any_layout(backend):
    def fresh():
        generator = torch.Generator().manual_seed(0)
        image = torch.randn(2, 3, 4, 5, generator=generator).to(backend.device)
        line = torch.randn(40, generator=generator).to(backend.device)
        grads = [
            image.permute(3, 1, 0, 2),
            image.clone().to(memory_format=torch.channels_last),
            line[::2],
            line.clone()[3:20],
            torch.complex(line, line.flip(0)).conj().imag,
            torch.randn(40, 60, generator=generator).to(backend.device)[:30, 10:50].t(),
            line.clone().view(1, 40, 1).as_strided((1, 40, 1), (7, 1, 3)),
        ]
        assert grads[4].is_neg() and not grads[5].is_contiguous()
        params = [Parameter(torch.zeros_like(grad)) for grad in grads]
        for param, grad in zip(params, grads):
            param.grad = grad
        return params, image, line

    params, image, line = fresh()
    expected = [p.grad.clone() for p in params]
    gaps = line[1::2].clone()
    strides = [p.grad.stride() for p in params]
    norm = torch.nn.utils.get_total_norm(expected)
    torch.testing.assert_close(clip(backend, params, 0.5), norm)
    for param, old, stride in zip(params, expected, strides):
        torch.testing.assert_close(param.grad, old * (0.5 / (norm + 1e-6)))
        assert param.grad.stride() == stride
    assert same_bits(line[1::2], gaps)  # what lies between the elements is somebody else's
    assert params[0].grad.data_ptr() == image.data_ptr()

    twins = fresh()[0]
    fusedopt.clip_grad_norm_(twins, 0.5, backend="reference")
    assert_same_bits(by_name(params), by_name(twins))


@pytest.mark.parametrize("norm_type", [2.0, math.inf, 1.0])
def test_expanded_tensors_are_measured_but_not_written(backend, norm_type):
    param = Parameter(torch.zeros(40, 5, device=backend.device))
    param.grad = torch.arange(5.0, device=backend.device).expand(40, 5)
    norm = fusedopt.get_total_norm(param.grad, norm_type, backend=named(backend))
    torch.testing.assert_close(norm, torch.nn.utils.get_total_norm(param.grad, norm_type))
    assert clip(backend, param, math.inf, norm_type) == norm
    whole = with_grad([3.0], device=backend.device)
    for call in (
        lambda: clip(backend, [whole, param], 1.0, norm_type),
        lambda: fusedopt.clip_grads_with_norm_([whole, param], 1.0, 9.0, backend=named(backend)),
    ):
        with pytest.raises(
            RuntimeError, match=r"gradient of parameter 1 has several elements in one memory"
        ):
            call()
    assert whole.grad == 3.0


def test_overlapping_windows_are_refused(backend):
    param = Parameter(torch.zeros(4, 3, device=backend.device))
    param.grad = torch.arange(6.0, device=backend.device).as_strided((4, 3), (1, 1))
    with pytest.raises(RuntimeError, match="gradient of parameter 0 has several elements in one"):
        clip(backend, param, 1.0)


class Subclass(torch.Tensor):
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return super().__torch_dispatch__(func, types, args, kwargs or {})


@pytest.mark.parametrize("norm_type", [2.0, math.inf, 1.0])
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda t: t.to_sparse(), RuntimeError, "is sparse (torch.sparse_coo); sparse gradients"),
        (lambda t: t.to(torch.complex64), TypeError, "is torch.complex64; expected float32"),
        (lambda t: t.to(torch.float8_e4m3fn), TypeError, "is torch.float8_e4m3fn; expected"),
        (lambda t: t.to("meta"), RuntimeError, "is on the meta device, without data"),
        (lambda t: t.as_subclass(Subclass), TypeError, "is a Subclass; expected a plain tensor"),
    ],
    ids=["sparse", "complex", "float8", "meta", "subclass"],
)
def test_refused_by_name_with_nothing_changed(backend, make, error, message, norm_type):
    grad = make(torch.ones(4, 4, device=backend.device))
    param = Parameter(torch.zeros(4, 4, device=grad.device, dtype=grad.dtype))
    param.grad = grad
    whole = with_grad([3.0], device=backend.device)
    for name in (named(backend), "reference"):
        with pytest.raises(error, match=re.escape(f"the gradient of parameter 1 {message}")):
            fusedopt.clip_grad_norm_([whole, param], 1.0, norm_type, backend=name)
        with pytest.raises(error, match=re.escape(f"the gradient of parameter 1 {message}")):
            fusedopt.clip_grads_with_norm_([whole, param], 1.0, 5.0, backend=name)
        with pytest.raises(error, match=re.escape(f"tensor 1 {message}")):
            fusedopt.get_total_norm([whole.grad, grad], norm_type, backend=name)
    assert whole.grad == 3.0


def test_freed_storage_and_what_is_no_tensor_are_refused(backend):
    param = with_grad([3.0, 4.0], device=backend.device)
    param.grad.untyped_storage().resize_(0)
    with pytest.raises(
        RuntimeError, match="gradient of parameter 0 has a storage of 0 bytes; expected 8"
    ):
        clip(backend, param, 1.0)
    with pytest.raises(AttributeError, match="'int' object has no attribute 'grad'"):
        clip(backend, [1], 1.0)
    with pytest.raises(TypeError, match="tensor 0 is a int; expected a tensor"):
        fusedopt.get_total_norm([1], backend=named(backend))


def test_backends_that_are_not_there():
    param = with_grad([3.0])
    with pytest.raises(ValueError, match="Invalid backend value: 'gpu'"):
        fusedopt.clip_grad_norm_(param, 1.0, backend="gpu")
    if backends.why_missing("cuda") is not None:
        with pytest.raises(RuntimeError, match="the gradient of parameter 0 is on cpu"):
            fusedopt.clip_grad_norm_(param, 1.0, backend="cuda")
    assert param.grad == 3.0


def test_without_the_extension_it_runs_in_plain_torch(monkeypatch):
    monkeypatch.setattr(backends, "_C", None)
    monkeypatch.setattr(backends, "import_error", "for a test")
    monkeypatch.setattr(backends, "_warned", set())
    params = with_grads(SHAPES)
    expected = torch.nn.utils.get_total_norm(grads_of(params))
    with pytest.warns(RuntimeWarning, match="can't be imported .for a test.*correct but slow"):
        norm = fusedopt.clip_grad_norm_(params, 1.0)
    torch.testing.assert_close(norm, expected)
    torch.testing.assert_close(norm64(params), 1.0)
    fusedopt.clip_grad_norm_(params, 1.0)  # and does not say so again


def test_autograd_learns_of_scaling_but_not_of_measuring(backend):
    x = torch.ones(3, device=backend.device, requires_grad=True)
    param = Parameter(torch.zeros(3, device=backend.device))
    param.grad = torch.full((3,), 2.0, device=backend.device)
    product = x * param.grad  # saved for backward
    fusedopt.get_total_norm(param.grad, backend=named(backend))
    product.sum().backward(retain_graph=True)
    clip(backend, param, 1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_gradients_that_require_grad(backend):
    """Of backward(create_graph=True)."""
    param = Parameter(torch.tensor([3.0, 4.0], device=backend.device))
    grad = torch.tensor([3.0, 4.0], device=backend.device, requires_grad=True) * 2
    param.grad = grad
    norm = clip(backend, param, 1.0)
    assert norm == 10.0 and not norm.requires_grad
    torch.testing.assert_close(param.grad.tolist(), [0.6, 0.8])


def test_lazily_copied_memory_is_not_written_through(backend):
    param = with_grad([3.0, 4.0], device=backend.device)
    twin = torch._lazy_clone(param.grad)
    clip(backend, param, 1.0)
    assert twin.tolist() == [3.0, 4.0]
    torch.testing.assert_close(param.grad.tolist(), [0.6, 0.8])


def test_devices_are_added_up():
    if backends.why_missing("cuda") is not None:
        pytest.skip(f"no CUDA here: {backends.why_missing('cuda')}")
    for norm_type in FUSED_NORM_TYPES:
        for devices in (["cpu", "cuda"], ["cuda", "cpu"]):
            params = [p for device in devices for p in with_grads(NOT_EMPTY, device=device)]
            grads = [p.grad.double().cpu() for p in params]
            expected = torch.nn.utils.get_total_norm(grads, norm_type)
            norm = fusedopt.clip_grad_norm_(params, 0.5, norm_type)
            assert norm.device.type == devices[0]
            torch.testing.assert_close(norm.cpu(), expected.float())
            for param, grad in zip(params, grads):
                torch.testing.assert_close(
                    param.grad.cpu(), (grad * (0.5 / (expected + 1e-6))).float()
                )


def test_nothing_waits_for_the_device():
    if backends.why_missing("cuda") is not None:
        pytest.skip(f"no CUDA here: {backends.why_missing('cuda')}")
    params = with_grads([(7,)] * 500, device="cuda")
    fusedopt.clip_grad_norm_(params, 1.0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        norm = fusedopt.clip_grad_norm_(params, 1.0)
        fusedopt.get_total_norm(grads_of(params), math.inf)
        fusedopt.clip_grads_with_norm_(params, 1.0, norm)
        fusedopt.clip_grads_with_norm_(params, 1.0, 3.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
