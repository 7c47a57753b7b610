"""Clipping alone: the accepted inputs, the results, and refusals that change nothing."""

from __future__ import annotations

import copy
import math
import pickle
import re

import pytest
import torch
from cases import DTYPES, SHAPES, assert_same_bits, make_params, same_bits
from clipped import (
    FUSED_NORM_TYPES,
    NOT_EMPTY,
    by_name,
    clip,
    grads_of,
    named,
    norm64,
    with_grad,
    with_grads,
)
from torch.nn import Parameter
from waiting import waiting_is_an_error

import fusedopt
from fusedopt.core import backends


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
    missing = backends.found._replace(module=None, reason="left out for a test")
    monkeypatch.setattr(backends, "found", missing)
    monkeypatch.setattr(backends, "_warned", set())
    params = with_grads(SHAPES)
    expected = torch.nn.utils.get_total_norm(grads_of(params))
    with pytest.warns(RuntimeWarning, match="torch's own functions.*left out for a test"):
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


def test_cpu_and_cuda_are_added_up():
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


def test_nothing_waits_for_cuda():
    if backends.why_missing("cuda") is not None:
        pytest.skip(f"no CUDA here: {backends.why_missing('cuda')}")
    params = with_grads([(7,)] * 500, device="cuda")
    fusedopt.clip_grad_norm_(params, 1.0)
    torch.cuda.synchronize()
    with waiting_is_an_error():
        norm = fusedopt.clip_grad_norm_(params, 1.0)
        fusedopt.get_total_norm(grads_of(params), math.inf)
        fusedopt.clip_grads_with_norm_(params, 1.0, norm)
        fusedopt.clip_grads_with_norm_(params, 1.0, 3.0)
