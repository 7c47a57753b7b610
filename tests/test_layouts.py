"""Any layout of parameters, gradients, states: the bits of the reference, the values of torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import CLASSES, DTYPES, assert_same_bits, same_bits, step_counts, tensors_of
from torch import Tensor

import fusedopt


def dense(*shape, dtype=torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(dtype)


def offset_by(elements: int, *shape, dtype=torch.float32) -> Tensor:
    """A tensor whose memory starts some elements later, so that it isn't aligned."""
    values = dense(*shape, dtype=dtype)
    flat = torch.zeros(elements + values.numel(), dtype=dtype)
    return flat[elements:].view(shape).copy_(values)


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "scalar": lambda: dense(),
    "one": lambda: dense(1),
    "3": lambda: dense(3),
    "channels_last": lambda: dense(3, 4, 5, 6).to(memory_format=torch.channels_last),
    "channels_last_1x1": lambda: dense(8, 4, 1, 1).to(memory_format=torch.channels_last),
    "channels_last_3d": lambda: dense(2, 3, 2, 4, 5).to(memory_format=torch.channels_last_3d),
    "transposed": lambda: dense(30, 21).t(),
    "transposed_large": lambda: dense(130, 140).t(),
    "permuted": lambda: dense(5, 6, 7).permute(2, 0, 1),
    "size_1_dims": lambda: dense(1, 9, 1, 4).permute(1, 2, 3, 0),
    "every_other": lambda: dense(400)[::2],
    "columns": lambda: dense(31, 40)[:, 3:20],
    "columns_large": lambda: dense(170, 230)[:, 5:125],
    "transposed_gaps": lambda: dense(20, 40)[:, ::3].t(),
    "diagonal": lambda: dense(50, 50).diagonal(),
    "rows": lambda: dense(20, 17)[3:9],
    "offset_1": lambda: offset_by(1, 555),
    "offset_2": lambda: offset_by(2, 555),
    "offset_3": lambda: offset_by(3, 17000),
    "offset_transposed": lambda: offset_by(1, 9, 11).t(),
    "empty": lambda: dense(0, 4),
}


def order(tensor: Tensor) -> tuple[int, ...]:
    return tuple(reversed(range(tensor.dim())))


# A layout of a gradient, given its values as a contiguous tensor.
GRADS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda g: g.contiguous(),
    "reversed": lambda g: g.permute(order(g)).contiguous().permute(order(g)),
    "gaps": lambda g: torch.stack([g, g + 1], dim=-1)[..., 0],
    "offset": lambda g: torch.cat([g.new_zeros(1), g.reshape(-1)])[1:].view(g.shape),
    "expanded": lambda g: g.new_full((), 0.25).expand(g.shape),
    "negated": lambda g: torch._neg_view(g.neg()),
    "of_complex": lambda g: torch.complex(g.double(), g.neg().double()).conj().imag.to(g.dtype),
    "imaginary": lambda g: torch.complex(g.float(), g.neg().float()).conj().imag,
}


def moved(tensor: Tensor, device: str) -> Tensor:
    """With all of its storage: a copy of a view alone is aligned, and has no gaps."""
    elements = tensor.untyped_storage().nbytes() // tensor.element_size()
    whole = tensor.as_strided((elements,), (1,), 0).to(device)
    return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def same_place(a: Tensor, b: Tensor) -> bool:
    return (a.stride(), a.storage_offset()) == (b.stride(), b.storage_offset())


class Trio:
    """Takes the same steps on a backend, on the reference and with torch's own class."""

    def __init__(self, backend, make: Callable[[], list[Tensor]], case, **kwargs):
        self.device = backend.device
        self.params, self.expected, self.twins = (
            [moved(p, self.device).detach().requires_grad_() for p in make()] for _ in range(3)
        )
        ours = {**case.kwargs, **kwargs}
        self.fused = backend.make(case.cls, self.params, **ours)
        self.reference = case.cls(self.expected, backend="reference", **ours)
        self.torch = case.twin(self.twins, foreach=False, **case.kwargs)
        self.limit = kwargs.get("max_grad_norm")

    def step(self, grads: list[Tensor | None]):
        trio = zip(self.params, self.expected, self.twins, grads)
        for param, expected, twin, grad in trio:
            param.grad = expected.grad = grad
            twin.grad = None if grad is None else grad.clone().to(twin.dtype)
        kept = [None if grad is None else grad.clone() for grad in grads]
        self.fused.step()
        self.reference.step()
        assert all(a is b is None or same_bits(a.clone(), b) for a, b in zip(grads, kept))
        if self.limit is not None:
            torch.nn.utils.clip_grad_norm_(self.twins, self.limit)
        self.torch.step()
        assert_same_bits(tensors_of(self.fused), tensors_of(self.reference))
        assert self.fused.grad_norm == self.reference.grad_norm
        self.check_torch()

    def check_torch(self):
        if self.params[0].dtype in (torch.float32, torch.float64):
            torch.testing.assert_close(
                tensors_of(self.fused), tensors_of(self.torch), rtol=1e-5, atol=2e-6
            )


def grads_like(params, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator).to(p.device, p.dtype) for p in params]


@pytest.mark.parametrize("case", CLASSES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_parameters(backend, layout, case):
    trio = Trio(backend, lambda: [dense(3), LAYOUTS[layout](), dense(40)], case, max_grad_norm=1.0)
    assert same_place(trio.params[1], LAYOUTS[layout]())
    for seed in range(2):
        trio.step(grads_like(trio.params, seed))


@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_parameter_whose_memory_holds_its_negative(backend, case):
    """The imaginary part of a conjugate is such a view; it has gaps, and the other one has none."""
    values = [
        torch.complex(dense(77), dense(77)).to(backend.device).conj().imag,
        torch._neg_view(dense(77).to(backend.device)),
    ]
    params = [value.requires_grad_() for value in values]
    twins = [value.detach().resolve_neg().clone().requires_grad_() for value in values]
    assert all(p.is_neg() for p in params) and not any(t.is_neg() for t in twins)
    fused = backend.make(case.cls, params, max_grad_norm=1.0, **case.kwargs)
    plain = backend.make(case.cls, twins, max_grad_norm=1.0, **case.kwargs)
    for seed in range(2):
        for param, twin, grad in zip(params, twins, grads_like(twins, seed)):
            param.grad = twin.grad = grad
        fused.step()
        plain.step()
        assert all(torch.equal(param, twin) for param, twin in zip(params, twins))


@pytest.mark.parametrize("grad", GRADS)
@pytest.mark.parametrize(
    "layout", ["3", "transposed", "channels_last", "columns", "offset_3", "scalar"]
)
def test_layouts_of_gradients(backend, layout, grad):
    trio = Trio(backend, lambda: [LAYOUTS[layout](), dense(40)], CLASSES[0], max_grad_norm=1.0)
    for seed in range(2):
        trio.step([GRADS[grad](g) for g in grads_like(trio.params, seed)])


def test_layout_of_the_gradient_may_change_at_every_step(backend):
    trio = Trio(backend, lambda: [dense(30, 21).t(), dense(33, 4)], CLASSES[0])
    for seed, layout in enumerate(["contiguous", "gaps", "expanded", "reversed", "contiguous"]):
        trio.step([GRADS[layout](g) for g in grads_like(trio.params, seed)])
    trio.step([None, grads_like(trio.params, 9)[1]])
    trio.step([GRADS["gaps"](grads_like(trio.params, 10)[0]), None])


def test_gradient_that_autograd_expanded(backend):
    trio = Trio(backend, lambda: [dense(17, 5)], CLASSES[0])
    grad = torch.autograd.grad(trio.params[0].sum(), trio.params)[0]
    assert grad.stride() == (0, 0)
    trio.params[0].sum().backward()
    trio.step([grad])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("start", [1, 2, 3])
@pytest.mark.parametrize("what", ["param", "grad", "exp_avg", "exp_avg_sq", "all"])
def test_unaligned_memory(backend, what, start, dtype):
    sizes = (1, 7, 555, 16400)

    def make():
        shift = start if what in ("param", "all") else 0
        return [offset_by(shift, n, dtype=dtype) for n in sizes]

    trio = Trio(backend, make, CLASSES[0], max_grad_norm=1.0)
    assert all(map(same_place, trio.params, make()))
    trio.step(grads_like(trio.params, 0))
    replaced = {}
    for param in trio.params:
        for key in {"all": ["exp_avg", "exp_avg_sq"]}.get(what, [what]):
            if (state := trio.fused.state[param]).get(key) is not None:
                unaligned = state[key].new_zeros(start + state[key].numel())[start:]
                replaced[param, key] = state[key] = unaligned.copy_(state[key])
    for seed in (1, 2):
        grads = grads_like(trio.params, seed)
        if what in ("grad", "all"):
            grads = [torch.cat([g.new_zeros(start), g])[start:] for g in grads]
        trio.step(grads)
    assert all(trio.fused.state[p][key] is tensor for (p, key), tensor in replaced.items())


@pytest.mark.parametrize("kwargs", [{}, {"nonfinite": "skip"}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_elements_between_those_of_a_parameter_are_left_alone(backend, dtype, kwargs):
    whole = dense(40, 60, dtype=dtype).to(backend.device)
    taken = torch.zeros(40, 60, dtype=torch.bool, device=backend.device)
    before = whole.clone()
    params = [whole[:, 1:20:2], whole[::2, 30:40].t(), whole[:, 41:42], whole[39, 42:]]
    for view in (taken[:, 1:20:2], taken[::2, 30:40].t(), taken[:, 41:42], taken[39, 42:]):
        view.fill_(True)
    params = [p.detach().requires_grad_() for p in params]
    optimizer = backend.make(fusedopt.FusedAdam, params, lr=0.1, **kwargs)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert same_bits(whole[~taken], before[~taken])
    assert (whole[taken] != before[taken]).all()
    before = whole.clone()
    params[0].grad[0, 0] = float("nan")
    if kwargs:
        optimizer.step()
        assert same_bits(whole, before)


@pytest.mark.parametrize(
    "shapes", [[(0,)], [(0,), (5,)], [(5,), (0,)], [(0, 3), (5,), (2, 0)]], ids=str
)
@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_empty_parameters_count_their_steps(backend, shapes, case):
    trio = Trio(backend, lambda: [dense(*shape) for shape in shapes], case, max_grad_norm=1.0)
    for seed in range(2):
        trio.step(grads_like(trio.params, seed))
    assert set(step_counts(trio.fused)) == {2 if "step" in case.cls.rule.scalars else 1}


@pytest.mark.parametrize("size", [1, 3, 555, 33333, 65537, 278011])
def test_sizes(backend, size):
    trio = Trio(backend, lambda: [dense(size)], CLASSES[0], max_grad_norm=1.0)
    trio.step(grads_like(trio.params, 0))


@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_another_dtype(backend, dtype, grad_dtype):
    """From the first step on, and of another dtype again at a later one."""
    shapes = [(21, 30), (16400,)]
    trio = Trio(
        backend, lambda: [dense(*s, dtype=dtype) for s in shapes], CLASSES[0], max_grad_norm=1.0
    )
    for param in (*trio.params, *trio.expected):
        param.grad_dtype = None
    for seed, used in enumerate([grad_dtype, grad_dtype, torch.bfloat16, dtype]):
        grads = [g.to(used) for g in grads_like(trio.params, seed)]
        grads[0] = grads[0].t().contiguous().t()
        trio.step(grads)
