"""TensorFlow's op: the bits of `fusedopt.arrays`, eager and in graphs; reads, threads, refusals.

`make test-tensorflow` runs it where there is no torch. So conftest.py is left out.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from typing import Any

import pytest

tf: Any = pytest.importorskip("tensorflow", reason="TensorFlow isn't installed")
np: Any = pytest.importorskip("numpy")

from fusedopt import arrays, front_ends  # noqa: E402
from fusedopt.core import c_library, extension, first_build, tensorflow_op  # noqa: E402

try:
    extension.find_library("tensorflow")
except ImportError as error:
    pytest.skip(str(error), allow_module_level=True)


SHAPES = [(0,), (1,), (), (555,), (33000,), (2, 33, 41)]
DTYPES = ["float32", "float64", "bfloat16", "float16"]
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "Adam": [{"amsgrad": True, "maximize": True}, {"weight_decay": 0.1, "betas": (0.5, 0.9)}],
    "RMSprop": [{"centered": True, "momentum": 0.9}],
    "SGD": [{"momentum": 0.9, "nesterov": True}, {"momentum": 0.9, "dampening": 0.5}],
}
CLASSES = [name for name in arrays.__all__ if name != "ArrayOptimizer"]
CASES = [(name, it) for name in CLASSES for it in ({}, *OPTIONS.get(name, []))]


def draw(seed: int, dtype: str, scale: float = 1.0) -> list[Any]:
    normal = np.random.default_rng(seed).normal
    return [np.asarray(normal(0, scale, it), tf.as_dtype(dtype).as_numpy_dtype) for it in SHAPES]


class OpUser:
    """Steps of the op over variables, with the options of an optimizer of `fusedopt.arrays`."""

    def __init__(self, optimizer: Any, graph: bool = False) -> None:
        rule = c_library.load().rules[optimizer.rule]
        numbers = optimizer._numbers()
        used = c_library.states_used(optimizer.rule, numbers.ctypes.data)
        first = {**rule.scalars, **rule.states}
        first |= {name: getattr(optimizer, it) for name, it in optimizer.first_values.items()}
        self.variables = [tf.Variable(it) for it in optimizer.params]
        self.states = {
            name: [
                tf.Variable(tf.fill(it.shape, tf.cast(first[name], it.dtype)))
                for it in self.variables
            ]
            for name in used
        }
        self.scalars = np.array([first[name] for name in rule.scalars], np.float32)
        self.options = numbers[None]
        self.limit = optimizer.max_grad_norm or np.inf
        self.attributes = {
            "rule": optimizer.rule,
            "groups": [0] * len(SHAPES),
            "states_used": [name in used for name in rule.states],
            "measure": optimizer.max_grad_norm is not None,
            "skip_nonfinite": optimizer.max_grad_norm is not None,
        }
        self._call = tf.function(self.call) if graph else self.call

    def call(self, grads: Any, scalars: Any, grad_scale: Any) -> Any:
        states = [it.handle for kept in self.states.values() for it in kept]
        return tensorflow_op.load()(
            variables=[it.handle for it in self.variables],
            states=states,
            grads=grads,
            lr=self.options[0, 0],
            options=self.options,
            scalars=scalars,
            max_grad_norm=self.limit,
            grad_scale=grad_scale,
            **self.attributes,
        )

    def step(self, grads: Any, grad_scale: float | None = None) -> Any:
        scale = [] if grad_scale is None else [grad_scale]
        tensors = [tf.convert_to_tensor(it) for it in grads]
        done = self._call(tensors, tf.constant(self.scalars), tf.constant(scale, tf.float32))
        self.scalars = done.new_scalars.numpy()
        return done


def make(name: str, dtype: str = "float32", graph: bool = False, **options: Any) -> tuple[Any, Any]:
    """An optimizer of `fusedopt.arrays` and a user of the op, with the same numbers."""
    optimizer = getattr(arrays, name)(draw(0, dtype), **options)
    return optimizer, OpUser(optimizer, graph)


def assert_same(user: OpUser, optimizer: Any) -> None:
    for index, param in enumerate(optimizer.params):
        state = optimizer.state[index]
        assert user.variables[index].numpy().tobytes() == param.tobytes(), index
        for name, kept in user.states.items():
            assert kept[index].numpy().tobytes() == state[name].tobytes(), (name, index)
        scalars = [state[it] for it in c_library.load().rules[optimizer.rule].scalars]
        assert np.array(scalars, np.float32).tobytes() == user.scalars.tobytes()


RUNS = [(*it, "float32", False) for it in CASES]
RUNS += [
    (name, {}, dtype, True) for name in ("Adam", "NAdam", "RMSprop", "SGD") for dtype in DTYPES
]


@pytest.mark.parametrize(("name", "options", "dtype", "graph"), RUNS, ids=str)
def test_the_bits_of_arrays(name, options, dtype, graph):
    """A clipped step, one of nan, an unscaled one, a large one. arrays has the reference's bits."""
    for limit in (None, 0.5):
        optimizer, user = make(name, dtype, graph, **options, max_grad_norm=limit)
        for seed, scale in enumerate([1.0, 1.0, 1.0, 1e4 if dtype == "float16" else 1e30], 1):
            grads = draw(seed, dtype, scale)
            if seed == 2 and limit is not None:
                grads[3][5] = np.nan
            unscale = 8.0 if seed == 3 else None
            optimizer.step(grads, grad_scale=unscale)
            done = user.step(grads, unscale)
            assert_same(user, optimizer)
            norm = np.float32(optimizer.grad_norm)
            np.testing.assert_array_equal(done.grad_norm.numpy(), norm)
            assert done.skipped.numpy() == optimizer.step_skipped


def test_groups_have_options_of_their_own():
    optimizer, user = make("AdamW", weight_decay=0.0)
    other, _ = make("AdamW", weight_decay=0.5)
    user.options = np.stack([optimizer._numbers(), other._numbers()])
    user.attributes["groups"] = [0, 1] * 3
    grads = draw(1, "float32")
    for it in (optimizer, other, user):
        it.step(grads)
    for index, variable in enumerate(user.variables):
        expected = (optimizer, other)[index % 2].params[index]
        assert variable.numpy().tobytes() == expected.tobytes()


def test_tensors_that_were_read_before_stay_as_they_are():
    _, user = make("Adam")
    before = draw(0, "float32")
    reads = [it.read_value() for it in user.variables]
    user.step(reads)  # a gradient may lie in the variable's own buffer
    assert all((it.numpy() == old).all() for it, old in zip(reads, before))
    assert (user.variables[3].numpy() != before[3]).any()


def test_the_buffers_stay_where_they_are():
    _, user = make("Adam", graph=True)
    user.step(draw(1, "float32"))
    kept = [it for its in (user.variables, *user.states.values()) for it in its[1:]]

    def places() -> list[int]:
        return [np.from_dlpack(it.read_value()).ctypes.data for it in kept]

    before = places()
    user.step(draw(2, "float32"))
    assert places() == before


def num_threads() -> int:
    return len(os.listdir("/proc/self/task"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs Linux's /proc")
def test_steps_of_many_threads_wait_for_each_other_and_share_one_team():
    optimizer, user = make("Adam", graph=True)
    tensors = [tf.zeros(it) for it in SHAPES]
    arguments = tensors, tf.constant([5.0]), tf.constant([], tf.float32)
    user._call(*arguments)
    before, counts = num_threads(), []

    def work() -> None:
        for _ in range(50):
            user._call(*arguments)
            counts.append(num_threads())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for it in threads:
        it.start()
    for it in threads:
        it.join()
    assert len(counts) == 200 and max(counts) <= before + len(threads)
    assert all((it.numpy() == old).all() for it, old in zip(user.variables, optimizer.params))


def change_shape(user: OpUser, grads: list[Any]) -> None:
    grads[3] = grads[3][:-1]


def change_dtype(user: OpUser, grads: list[Any]) -> None:
    grads[4] = grads[4].astype(np.float64)


def change_state(user: OpUser, grads: list[Any]) -> None:
    user.states["exp_avg_sq"][2] = tf.Variable([1.0, 2.0])


def repeat(user: OpUser, grads: list[Any]) -> None:
    user.variables[5] = user.variables[4]
    user.states["exp_avg"][5], user.states["exp_avg_sq"][5] = tf.Variable(0.0), tf.Variable(0.0)


def drop_states(user: OpUser, grads: list[Any]) -> None:
    del user.states["exp_avg"]


def drop_options(user: OpUser, grads: list[Any]) -> None:
    user.attributes["groups"] = [0, 1] * 3


def refuse_option(user: OpUser, grads: list[Any]) -> None:
    user.options[0, 0] = -1.0


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (change_shape, r"grads\[3\] is float of the shape \[554\]; expected float.*\[555\]"),
        (change_dtype, r"grads\[4\] is double.*; expected float of the shape \[33000\]"),
        (
            change_state,
            r"states\[8\] is float of the shape \[2\]; expected float of the shape \[\]",
        ),
        (repeat, r"variables\[4\] and variables\[5\] are one variable"),
        (drop_states, r"6 variables, 6 states and 6 gradients; expected 6, 12 and 6"),
        (drop_options, r"options has 1 rows; expected 2, one for each group"),
        (refuse_option, r"Invalid lr value: -1; expected a number >= 0"),
    ],
)
def test_refusals_name_the_tensor_and_change_nothing(spoil, words):
    _, user = make("Adam")
    grads = draw(1, "float32")
    user.step(grads)
    kept = [it for its in (user.variables, *user.states.values()) for it in its]
    before = [it.numpy() for it in kept]
    spoil(user, grads)
    with pytest.raises(tf.errors.InvalidArgumentError, match=words):
        user.step(grads)
    assert all((it.numpy() == old).all() for it, old in zip(kept, before))


def test_variables_of_integers_are_refused():
    _, user = make("SGD")
    user.variables[1] = tf.Variable([1])
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"is int32; expected float, double"):
        user.call([tf.zeros(it) for it in SHAPES], [0.0], [])


def test_an_op_for_another_tensorflow_is_refused(monkeypatch):
    monkeypatch.setattr(tf, "__version__", "9.9.0")
    words = r"is compiled for TensorFlow 2\..*, but 9.9.0 runs here"
    monkeypatch.setenv(first_build.SWITCH, "0")
    with pytest.raises(ImportError, match=f"{words}, and {first_build.SWITCH}=0 forbids"):
        tensorflow_op.load.__wrapped__()
    assert "9.9.0 runs here" in (tensorflow_op.why_not("9.9.0") or "")


def test_an_op_for_another_tensorflow_is_compiled_once(monkeypatch, tmp_path):
    """Of the installed package: the source folder has no sources in it."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    package = extension.find_library("tensorflow").parent
    if not (package / "csrc").is_dir():
        pytest.skip("the op was built in place")
    library = package / "libfusedopt_kernels.so"
    monkeypatch.setattr(tensorflow_op, "find_library", lambda name: library)
    assert tensorflow_op.why_not("9.9.0") is None
    path = tensorflow_op.library_for("9.9.0")
    assert path.is_file() and path.is_relative_to(tmp_path)
    script = f"import tensorflow as tf; tf.load_op_library({str(path)!r}).fusedopt_step"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_front_end_is_listed(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "tensorflow")
    text = front_ends.describe()["fusedopt.keras"]
    assert text.startswith("for Keras ") and "KERAS_BACKEND=tensorflow" in text
    monkeypatch.setenv(first_build.SWITCH, "0")
    monkeypatch.setattr(front_ends, "_version", lambda package: "9.9.0")
    text = front_ends.describe()["fusedopt.keras"]
    assert text.startswith("can't be used: KERAS_BACKEND is tensorflow, and ")
    assert "9.9.0 runs here" in text
