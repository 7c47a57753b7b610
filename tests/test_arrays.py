"""`fusedopt.arrays`: the reference's bits, torch's defaults, refusals, memory, other libraries."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, CLASSES, Case, make_params, same_bits, set_grads

import fusedopt
from fusedopt.core import backends

np: Any = pytest.importorskip("numpy")
if backends._C is None:
    pytest.skip("the kernels are not compiled", allow_module_level=True)

from fusedopt import arrays  # noqa: E402
from fusedopt.core import c_library  # noqa: E402

ROOT = Path(__file__).parent.parent
SHAPES = [(0,), (1,), (), (555,), (16385,), (2, 33, 41)]
# All options in the two dtypes that differ most; all dtypes with typical options.
RUNS = [(case, dtype) for case in CASES for dtype in ("float32", "bfloat16")]
RUNS += [(case, dtype) for case in CLASSES for dtype in ("float64", "float16")]
OURS = {"params", "max_grad_norm", "nonfinite", "threads", "state"}


def class_of(case: Case) -> Any:
    return getattr(arrays, case.cls.__name__.removeprefix("Fused"))


def shared(tensor: torch.Tensor) -> Any:
    """The tensor's memory as an array."""
    tensor = tensor.detach()
    if tensor.dtype != torch.bfloat16:
        return tensor.numpy()
    ml_dtypes: Any = pytest.importorskip("ml_dtypes")
    return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)


def tensor_of(array: Any) -> torch.Tensor:
    """A copy of the array as a tensor."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def assert_same_state(optimizer: Any, reference: Any, params: list[torch.nn.Parameter]) -> None:
    for index, param in enumerate(params):
        assert same_bits(tensor_of(optimizer.params[index]), param.detach()), index
        state = reference.state.get(param, {})
        ours = {name: it for name, it in optimizer.state[index].items() if name in state}
        assert ours.keys() == state.keys()
        for name, value in state.items():
            assert same_bits(tensor_of(ours[name]), value), (index, name)


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=str)
def test_the_bits_of_the_reference(case, dtype):
    """Clipped and plain steps, an unscaled one, one without some gradients, one of nan."""
    for options in ({}, {"max_grad_norm": 0.5}):
        params = make_params(SHAPES, getattr(torch, dtype))
        numpys = [shared(it.detach().clone()) for it in params]
        reference = case.cls(params, **case.kwargs, **options, backend="reference")
        optimizer = class_of(case)(numpys, **case.kwargs, **options)
        for step in range(5):
            set_grads(params, step, scale=30.0 if step == 3 else 1.0)
            if step == 1:
                params[3].grad = None
            if step == 2 and options:
                params[4].grad[-1] = torch.nan
            scale = 8.0 if step == 3 else None
            reference.grad_scale = None if scale is None else torch.tensor(scale)
            reference.step()
            grads = [None if it.grad is None else shared(it.grad) for it in params]
            optimizer.step(grads, grad_scale=scale)
            assert_same_state(optimizer, reference, params)
            norm = float(reference.grad_norm)
            assert np.float32(optimizer.grad_norm) == norm or norm != norm
            assert optimizer.step_skipped == bool(reference.step_skipped)
            assert optimizer.skipped_steps == int(reference.skipped_steps)


def test_every_rule_has_a_class_with_its_options():
    classes = [getattr(arrays, name) for name in arrays.__all__ if name != "ArrayOptimizer"]
    parts = {"scale", "muon"}  # no optimizers: clipping alone, and half a step
    assert {cls.rule for cls in classes} == {*c_library.load().rules} - parts
    for cls in classes:
        options = {*c_library.load().rules[cls.rule].options}
        fields = {it.name for it in dataclasses.fields(cls)} - OURS
        fixed = {name for name in options if isinstance(getattr(cls, name, None), bool)} - fields
        assert fields | fixed == options, cls


@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_defaults_and_their_order_are_torchs(case):
    ours = inspect.signature(class_of(case)).parameters
    theirs = inspect.signature(case.cls).parameters
    assert {*ours} - OURS <= {*theirs}
    for name in {*ours} - OURS:
        expected = theirs[name].default
        assert ours[name].default == (0 if expected is None else expected), name
    positional = [name for name, it in ours.items() if it.kind is it.POSITIONAL_OR_KEYWORD]
    assert positional == [name for name in theirs if name in positional]


def make(cls: Any = None, **options: Any) -> Any:
    params = [np.ones((3, 2), np.float32), np.ones(4)]
    return (cls or arrays.AdamW)(params, **options)


def make_grads() -> list[Any]:
    return [np.ones((3, 2), np.float32), np.ones(4)]


def read_only(array: Any) -> Any:
    array.flags.writeable = False
    return array


def unaligned() -> Any:
    return np.zeros(17, np.uint8)[1:].view(np.float32)


BAD_PARAMS = {
    "list": ([1.0], TypeError, r"params\[0\] is a list; expected a NumPy array"),
    "int": (np.ones(3, np.int32), TypeError, r"params\[0\] is dtype\('int32'\); expected one of"),
    "swapped": (np.ones(3, ">f4"), TypeError, r"params\[0\] is dtype\('>f4'\); expected one of"),
    "transposed": (np.ones((3, 2)).T, ValueError, r"params\[0\] has the strides .* contiguous"),
    "strided": (np.ones(6)[::2], ValueError, r"params\[0\] has the strides \(16,\)"),
    "unaligned": (unaligned(), ValueError, r"params\[0\] .* aligned"),
    "read-only": (read_only(np.ones(3)), ValueError, r"params\[0\] is read-only"),
    "needs grad": (torch.ones(3, requires_grad=True), TypeError, r"params\[0\], a Tensor, can't"),
    "meta": (torch.ones(3, device="meta"), TypeError, r"params\[0\], a Tensor, can't be shared"),
}


@pytest.mark.parametrize("kind", BAD_PARAMS)
def test_parameters_that_are_refused(kind):
    value, error, message = BAD_PARAMS[kind]
    with pytest.raises(error, match=message):
        arrays.AdamW([value])


def test_parameters_that_share_memory_are_refused():
    whole = np.ones(8)
    with pytest.raises(ValueError, match=r"params\[0\] shares memory with params\[1\]"):
        arrays.SGD([whole[3:], whole[:4]])
    arrays.SGD([whole[4:], whole[:4], whole[4:4]])


BAD_GRADS = {
    "too few": (lambda opt: [None], ValueError, "grads has 1 items; expected 2"),
    "shape": (lambda opt: [None, np.ones(3)], ValueError, r"grads\[1\] has the shape \(3,\)"),
    "dtype": (lambda opt: [np.ones((3, 2)), None], TypeError, r"grads\[0\] is dtype\('float64'\)"),
    "strides": (
        lambda opt: [np.ones((2, 3), np.float32).T, None],
        ValueError,
        r"grads\[0\] has the strides",
    ),
    "param": (
        lambda opt: [None, opt.params[1]],
        ValueError,
        r"grads\[1\] shares memory with params\[1\], which the step writes",
    ),
    "state": (
        lambda opt: [opt.state[0]["exp_avg"], None],
        ValueError,
        r"grads\[0\] shares memory with state\[0\]\['exp_avg'\]",
    ),
}


def snapshot(optimizer: Any) -> list[Any]:
    states = [it for state in optimizer.state for it in state.values()]
    return [it.tobytes() for it in (*optimizer.params, *states, optimizer._control)]


@pytest.mark.parametrize("kind", BAD_GRADS)
def test_gradients_that_are_refused_change_nothing(kind):
    optimizer = make()
    optimizer.step(make_grads())
    before = snapshot(optimizer)
    value, error, message = BAD_GRADS[kind]
    with pytest.raises(error, match=message):
        optimizer.step(value(optimizer))
    assert snapshot(optimizer) == before


BAD_OPTIONS = {
    "lr": (-1.0, "Invalid lr value: -1; expected a number >= 0"),
    "betas": ((0.9, 1.0), r"Invalid betas value: 1; expected a number in \[0, 1\)"),
    "eps": (float("nan"), "Invalid eps value: nan"),
    "max_grad_norm": (0.0, "Invalid max_grad_norm value: 0.0; expected a float > 0 or None"),
    "nonfinite": ("ignore", "Invalid nonfinite value: 'ignore'; expected one of 'skip'"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_options_that_are_refused_change_nothing(name):
    value, message = BAD_OPTIONS[name]
    with pytest.raises(ValueError, match=message):
        make(**{name: value})
    optimizer = make()
    optimizer.step(make_grads())
    before = snapshot(optimizer)
    setattr(optimizer, name, value)
    with pytest.raises(ValueError, match=message):
        optimizer.step(make_grads())
    assert snapshot(optimizer) == before


def test_options_that_need_each_other():
    with pytest.raises(ValueError, match=r"expected 2 numbers"):
        make(betas=(0.9,))
    with pytest.raises(ValueError, match=r"nesterov=True with momentum=0\.0"):
        make(arrays.SGD, nesterov=True)
    with pytest.raises(ValueError, match="Invalid etas value"):
        make(arrays.Rprop, etas=(1.2, 0.5))


STATES = {
    "dtype": (
        lambda: np.ones((3, 2)),
        TypeError,
        r"is dtype\('float64'\); expected dtype\('float32",
    ),
    "shape": (lambda: np.ones(6, np.float32), ValueError, r"has the shape \(6,\)"),
    "read-only": (lambda: read_only(np.ones((3, 2), np.float32)), ValueError, "is read-only"),
    "list": (lambda: [1.0], TypeError, "is a list; expected a NumPy array"),
}


@pytest.mark.parametrize("kind", STATES)
def test_states_that_are_refused(kind):
    optimizer = make()
    optimizer.step(make_grads())
    value, error, message = STATES[kind]
    optimizer.state[0]["exp_avg"] = value()
    params = [it.copy() for it in optimizer.params]
    with pytest.raises(error, match=r"state\[0\]\['exp_avg'\] " + message):
        optimizer.step(make_grads())
    assert all((now == before).all() for now, before in zip(optimizer.params, params))


def test_a_state_that_is_replaced_is_followed_and_two_in_one_memory_are_refused():
    optimizer, other = make(), make()
    for it in (optimizer, other):
        it.step(make_grads())
    optimizer.state[0] = {name: it.copy() for name, it in other.state[0].items()}
    for it in (optimizer, other):
        it.step(make_grads())
    assert optimizer.state[0]["step"] == 2
    assert (optimizer.state[0]["exp_avg"] == other.state[0]["exp_avg"]).all()
    optimizer.state[0]["exp_avg"] = optimizer.state[0]["exp_avg_sq"]
    with pytest.raises(ValueError, match="shares memory with"):
        optimizer.step(make_grads())


def test_a_skipped_first_step_leaves_no_state_and_raise_names_the_parameters():
    for mode in ("skip", "raise"):
        optimizer = make(arrays.SGD, momentum=0.9, nonfinite=mode)
        grads = make_grads()
        grads[1][2], grads[1][3] = np.nan, np.inf
        if mode == "raise":
            with pytest.raises(fusedopt.NonFiniteGradientError, match="1 inf and 1 nan") as caught:
                optimizer.step(grads)
            assert caught.value.names == ["params[1]"]
        else:
            optimizer.step(grads)
        assert optimizer.state == [{}, {}] and optimizer.skipped_steps == 1
        optimizer.step(make_grads(), found_inf=True)
        assert optimizer.skipped_steps == 2 and (optimizer.params[0] == 1).all()
        optimizer.step(make_grads(), found_inf=False)
        assert not optimizer.step_skipped and (optimizer.params[0] < 1).all()


def test_gradients_of_1e30_are_clipped():
    param = np.zeros(1000, np.float32)
    optimizer = arrays.SGD([param], lr=1.0, max_grad_norm=1.0)
    optimizer.step([np.full(1000, 1e30, np.float32)])
    assert np.isclose(np.linalg.norm(param), 1.0)


def test_arrays_of_other_libraries_are_changed_in_place():
    tensor, grad = torch.ones(5), torch.ones(5)
    arrays.SGD([tensor], lr=0.25).step([grad])
    assert tensor.tolist() == [0.75] * 5


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_copies_go_on_by_themselves(copied):
    optimizer = make(max_grad_norm=0.5)
    optimizer.step(make_grads())
    other = copied(optimizer)
    before = snapshot(optimizer)
    other.step(make_grads())
    assert snapshot(optimizer) == before
    optimizer.step(make_grads())
    assert snapshot(optimizer) == snapshot(other)


def test_the_number_of_threads_changes_no_bit():
    grads = [np.linspace(-1, 1, 100_000, dtype=np.float32)]
    results = []
    for threads in (1, 2, None):
        param = np.ones(100_000, np.float32)
        arrays.AdamW([param], max_grad_norm=1.0, threads=threads).step(grads)
        results.append(param.tobytes())
    assert results[0] == results[1] == results[2]


def test_without_torch_and_in_a_forked_child():
    """A child has none of its parent's threads; it must not wait for them."""
    code = """if True:
        import os, sys
        sys.modules["torch"] = None
        import numpy as np
        from fusedopt import arrays
        param = np.zeros(200_000, np.float32)
        optimizer = arrays.SGD([param], lr=1.0, threads=2)
        optimizer.step([np.ones_like(param)])
        if os.fork() == 0:
            optimizer.step([np.ones_like(param)])
            os._exit(0 if (param == -2).all() else 1)
        _, status = os.wait()
        assert status == 0 and (param == -1).all()
        print(optimizer.grad_norm)
    """
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert abs(float(done.stdout) - 200_000**0.5) < 1e-6
