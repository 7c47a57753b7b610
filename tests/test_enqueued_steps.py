"""The boundary in C enqueues steps on CUDA (here: emulated): the bits of the CPU's kernels."""

from __future__ import annotations

import ctypes
import math
from ctypes import c_int32, c_int64, c_void_p
from typing import Any

import pytest

from fusedopt.core import backends

np: Any = pytest.importorskip("numpy")
if backends._C is None:
    pytest.skip("the kernels are not compiled", allow_module_level=True)
from conftest import emulated  # noqa: E402

from fusedopt import arrays  # noqa: E402
from fusedopt.core import c_library  # noqa: E402

SIZES = [5, 0, 40_000, 16_385, 1]
STEPS = 5
LRS = [0.1, 0.01, 0.3, 0.2, 0.05]
NO_DECAY = {"momentum_decay": 1e6}  # the momentum doesn't change
CASES = [
    (arrays.AdamW, {}, []),
    (arrays.Adam, {"amsgrad": True, "maximize": True}, []),
    (arrays.NAdam, NO_DECAY, [0.9]),
    (arrays.RMSprop, {"centered": True, "momentum": 0.9}, []),
    (arrays.SGD, {}, []),
    (arrays.LAMB, {}, []),
]


class Cuda(ctypes.Structure):
    """`fusedopt_cuda`."""

    _fields_ = (
        ("device", c_int32),
        ("stream", c_void_p),
        ("memory", c_void_p),
        ("lr", c_void_p),
        ("factors", c_void_p),
        ("count", c_void_p),
        ("skips", c_void_p),
        ("grad_norm", c_void_p),
    )


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    functions = ctypes.CDLL(emulated().__file__)
    c_library._declare(functions)
    functions.fusedopt_device_bytes.argtypes = [c_void_p]
    functions.fusedopt_device_bytes.restype = c_int64
    functions.fusedopt_enqueue_step.argtypes = [c_void_p, c_void_p, c_void_p]
    return functions


def address(array: Any) -> int:
    return array.ctypes.data


def addresses(items: list[Any]) -> Any:
    return np.array([0 if it is None else address(it) for it in items], np.uint64)


class Enqueued:
    """Steps on the device, with the options of an optimizer of `fusedopt.arrays`."""

    def __init__(self, library: ctypes.CDLL, like: Any, factors: list[float]) -> None:
        self.library, self.limit = library, like.max_grad_norm
        rule = c_library.load().rules[like.rule]
        self.options = like._numbers()
        used = c_library.states_used(like.rule, address(self.options))
        self.params = [it.copy() for it in like.params]
        first = {**rule.scalars, **rule.states}
        first |= {name: getattr(like, it) for name, it in like.first_values.items()}
        self.states = [{name: np.full_like(it, first[name]) for name in used} for it in self.params]
        self.count, self.skips = np.zeros((), np.int32), np.zeros((), np.int32)
        self.grad_norm = np.zeros((), np.float32)
        self.factors = np.array(factors, np.float32)
        assert len(rule.scalars) == 1 + len(factors)
        every = [
            [param, *(state.get(name) for name in rule.states), *(None for _ in rule.scalars)]
            for param, state in zip(self.params, self.states, strict=True)
        ]
        self.arrays = addresses([it for row in every for it in row])
        count = len(self.params)
        self.plan = library.fusedopt_new_plan(
            like.rule.encode(),
            count,
            (c_int64 * count)(*(it.size for it in self.params)),
            (c_int32 * count)(),
            None,
            1,
            1,
        )
        assert self.plan is not None

    def step(self, grads: list[Any], lr: float, scale: float = 1.0) -> None:
        memory = np.full(self.library.fusedopt_device_bytes(self.plan), 255, np.uint8)
        on_device, factor = np.float32(lr).reshape(1), np.float32(scale).reshape(1)
        lrs, of_grads = addresses([on_device]), addresses(grads)
        step = c_library.Step(
            arrays=address(self.arrays),
            grads=address(of_grads),
            options=address(self.options),
            max_grad_norm=self.limit,
            measure=1,
            skip_nonfinite=1,
            grad_scale=address(factor),
        )
        cuda = Cuda(
            memory=address(memory),
            lr=address(lrs),
            factors=address(self.factors),
            count=address(self.count),
            skips=address(self.skips),
            grad_norm=address(self.grad_norm),
        )
        pointers = ctypes.byref(step), ctypes.byref(cuda)
        assert self.library.fusedopt_enqueue_step(self.plan, *pointers) == 0

    def __del__(self) -> None:
        self.library.fusedopt_free_plan(self.plan)


def draw(step: int, sizes: list[int]) -> list[Any]:
    random = np.random.default_rng(step)
    return [random.normal(size=size).astype(np.float32) for size in sizes]


@pytest.mark.parametrize("sizes", [SIZES, [3] * 600], ids=["few", "many"])
@pytest.mark.parametrize(
    ("cls", "options", "factors"), CASES, ids=lambda it: getattr(it, "__name__", "")
)
def test_emulated_steps_have_the_bits_of_the_cpu(library, cls, options, factors, sizes):
    """The learning rate is on the device; a batch of inf is skipped; gradients are scaled."""
    host = cls(draw(99, sizes), max_grad_norm=0.5, nonfinite="skip", **options)
    ours = Enqueued(library, host, factors)
    for step, lr in enumerate(LRS):
        grads = draw(step, sizes)
        if step == 2:
            grads[0][0] = math.inf
        host.lr = float(np.float32(lr))
        host.step(grads, grad_scale=4.0)
        ours.step(grads, lr, 4.0)
        assert ours.grad_norm == np.float32(host.grad_norm) or step == 2
    assert (ours.count, ours.skips) == (STEPS - 1, 1)
    for param, expected in zip(ours.params, host.params, strict=True):
        assert np.array_equal(param, expected)
    for state, expected in zip(ours.states, host.state, strict=True):
        assert all(np.array_equal(it, expected[name]) for name, it in state.items())


def test_a_plan_for_cuda_needs_its_kernels():
    if backends._C.built_with_cuda:
        pytest.skip("this build has CUDA kernels")
    functions = c_library.load().functions
    assert functions.fusedopt_new_plan(b"sgd", 0, None, None, None, 1, 1) is None
    assert functions.fusedopt_error() == b"fusedopt is compiled without its CUDA kernels"
