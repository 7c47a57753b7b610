"""The kernels through the C boundary (csrc/c/fusedopt.h): front ends that need no torch use it.

It imports only the standard library.
"""

from __future__ import annotations

import ctypes
import functools
import json
import threading
from ctypes import c_char_p, c_double, c_int, c_int32, c_int64, c_void_p
from typing import Any, NamedTuple

from fusedopt.core.extension import INSTALL, find_library


class Step(ctypes.Structure):
    """`fusedopt_step`: all arrays as addresses."""

    _fields_ = (
        ("arrays", c_void_p),
        ("grads", c_void_p),
        ("options", c_void_p),
        ("max_grad_norm", c_double),
        ("measure", c_int32),
        ("skip_nonfinite", c_int32),
        ("grad_scale", c_void_p),
        ("found_inf", c_void_p),
        ("total", c_void_p),
        ("control", c_void_p),
        ("threads", c_int32),
        ("pool", c_void_p),
        ("schedule", c_void_p),
    )


class RuleInfo(NamedTuple):
    """A rule of the kernels.

    Attributes:
        options: how many numbers each option holds.
        scalars: the first value of each 0-d float32 state.
        states: the first value of each state that is shaped as the parameter.
    """

    options: dict[str, int]
    scalars: dict[str, float]
    states: dict[str, float]


class Library(NamedTuple):
    """The loaded library.

    Attributes:
        rules: all rules by name.
        dtypes: names; a plan takes their indices.
        control: the names of a step's readings, a float64 each.
        message_size: how many numbers the message of a step over ranks has.
    """

    functions: ctypes.CDLL
    rules: dict[str, RuleInfo]
    dtypes: list[str]
    control: list[str]
    message_size: int


@functools.cache
def load() -> Library:
    """Loads the library once.

    Raises:
        ImportError: it is not compiled, or from other sources.
    """
    path = find_library()
    functions = ctypes.CDLL(str(path))
    _declare(functions)
    described = json.loads(functions.fusedopt_describe())
    if described["step_bytes"] != ctypes.sizeof(Step):
        raise ImportError(f"{path} was compiled from other sources: build it again: `{INSTALL}`")
    rules = {name: RuleInfo(**rule) for name, rule in described["rules"].items()}
    names = described["dtypes"], described["control"]
    return Library(functions, rules, *names, described["message_size"])


def _declare(functions: ctypes.CDLL) -> None:
    for name, result, *arguments in (
        ("error", c_char_p),
        ("describe", c_char_p),
        ("states_used", c_int64, c_char_p, c_void_p),
        ("new_plan", c_void_p, c_char_p, c_int64, c_void_p, c_void_p, c_void_p, c_int64, c_int32),
        ("free_plan", None, c_void_p),
        ("take_step", c_int, c_void_p, ctypes.POINTER(Step)),
    ):
        function = getattr(functions, f"fusedopt_{name}")
        function.restype, function.argtypes = result, arguments


def _error() -> ValueError:
    return ValueError(load().functions.fusedopt_error().decode())


def states_used(rule: str, options: int) -> list[str]:
    """The names of the states that the rule uses with these options (the address of float64s).

    Raises:
        ValueError: an option is out of range.
    """
    library = load()
    bits = library.functions.fusedopt_states_used(rule.encode(), options)
    if bits < 0:
        raise _error()
    return [name for k, name in enumerate(library.rules[rule].states) if bits >> k & 1]


def in_order(rule: str, options: dict[str, Any]) -> list[Any]:
    """The numbers of a rule's options in the order of the kernels; 0 for those that aren't named.

    Raises:
        ImportError: the library was compiled from older sources, and lacks an option.
    """
    known = load().rules[rule].options
    if unknown := options.keys() - known.keys():
        raise ImportError(f"the compiled kernels lack {sorted(unknown)}: build them: `{INSTALL}`")
    values = (options.get(name, 0.0) for name in known)
    return [
        it for value in values for it in (value if isinstance(value, (tuple, list)) else (value,))
    ]


class Plan:
    """`fusedopt_plan`: tensors that are laid out once. Its steps wait for each other."""

    def __init__(self, rule: str, sizes: list[int], dtypes: list[int]) -> None:
        """`sizes`: elements per tensor; `dtypes`: indices into `Library.dtypes`.

        Raises:
            ValueError: the tensors are refused.
        """
        count = len(sizes)
        self._functions = load().functions
        self._lock = threading.Lock()
        self._address = self._functions.fusedopt_new_plan(
            rule.encode(), count, (c_int64 * count)(*sizes), (c_int32 * count)(*dtypes), None, 1, 0
        )
        if self._address is None:
            raise _error()

    def step(self, step: Step) -> None:
        """Takes one step, or skips it.

        Raises:
            ValueError: an option is out of range.
        """
        with self._lock:
            if self._functions.fusedopt_take_step(self._address, step) != 0:
                raise _error()

    def __del__(self) -> None:
        if getattr(self, "_address", None) is not None:
            self._functions.fusedopt_free_plan(self._address)
