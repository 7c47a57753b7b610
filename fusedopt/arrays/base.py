"""The base of all classes here: one step over arrays, by the compiled kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fusedopt.arrays import memory
from fusedopt.arrays.memory import Array
from fusedopt.arrays.table import SCALAR, Table
from fusedopt.core import c_library
from fusedopt.core.nonfinite import (
    NONFINITE_MODES,
    NonFinite,
    NonFiniteGradientError,
    check_choice,
    check_limit,
    mode_of,
)


@dataclass(eq=False)
class ArrayOptimizer:
    """What all classes here have in common. All options may be changed between steps.

    Attributes:
        params: writable contiguous arrays of float32, float64, float16 or bfloat16, of any shape;
            of NumPy, or of a library whose CPU arrays speak DLPack. A step changes them in place.
        max_grad_norm: all gradients are clipped by one factor if their global L2 norm is larger
            than this number. None: they are not clipped.
        nonfinite: "skip" changes nothing if a gradient holds inf or nan, "raise" also raises
            `NonFiniteGradientError`, "propagate" updates regardless. None is "skip" with
            `max_grad_norm`, else "propagate".
        threads: how many threads a step may use; None: as many as OpenMP allows
            (`OMP_NUM_THREADS`).
        state: per parameter, its arrays by torch's names: 0-d float32 counters, and arrays of the
            parameter's shape and dtype. It is filled by the parameter's first applied step. To
            load a state, fill the dict.

    Raises:
        ImportError: the kernels are not compiled.
        TypeError, ValueError: a parameter or an option is refused; the message names it.
    """

    params: Sequence[Any] = field(repr=False)
    _: KW_ONLY
    max_grad_norm: float | None = None
    nonfinite: NonFinite | None = None
    threads: int | None = None
    state: list[dict[str, Array]] = field(init=False, repr=False)

    rule: ClassVar[str]
    first_values: ClassVar[dict[str, str]] = {}  # the option that a new state is filled with

    def __post_init__(self) -> None:
        self._arrays = self._views()
        self._info = c_library.load().rules[self.rule]
        self._control = np.zeros(len(c_library.load().control))
        self._table: Table | None = Table(self.rule, self._arrays)
        self.state = [{} for _ in self._arrays]
        self._mode()
        c_library.states_used(self.rule, memory.address(self._numbers()))

    def _views(self) -> list[Array]:
        return [memory.view(f"params[{i}]", it) for i, it in enumerate(self.params)]

    def __getstate__(self) -> dict[str, Any]:
        return {name: it for name, it in vars(self).items() if name not in ("_arrays", "_table")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._arrays, self._table = self._views(), None

    @property
    def grad_norm(self) -> float:
        """The global gradient norm of the last step, before clipping."""
        return self._reading("grad_norm")

    @property
    def step_skipped(self) -> bool:
        """Whether the last step changed nothing."""
        return self._reading("step_skipped") != 0

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped so far."""
        return int(self._reading("skipped_steps"))

    def _reading(self, name: str) -> float:
        return float(self._control[c_library.load().control.index(name)])

    def step(
        self,
        grads: Sequence[Any],
        *,
        grad_scale: float | None = None,
        found_inf: bool | float | None = None,
    ) -> None:
        """Checks, unscales, measures and clips the gradients, and updates all arrays in place.

        Args:
            grads: for each parameter a contiguous array of its shape and dtype, or None: then the
                parameter is left alone. They are only read.
            grad_scale: the factor that the loss was multiplied by.
            found_inf: if it is not 0, the step is skipped.

        Raises:
            NonFiniteGradientError: gradients held inf or nan, with `nonfinite="raise"`.
            TypeError, ValueError: a gradient, a state or an option is refused. In both cases
                nothing was changed.
        """
        mode, numbers = self._mode(), self._numbers()
        used = c_library.states_used(self.rule, memory.address(numbers))
        views = self._checked_grads(grads)
        table = self._table = self._table or Table(self.rule, self._arrays)
        new = [self._new_state(i, used) if it is not None else {} for i, it in enumerate(views)]
        table.look_at([{**old, **it} if it else old for old, it in zip(self.state, new)], used)
        places = table.grads(views)
        scale, told = _float32(grad_scale), _float32(found_inf)
        limit = self.max_grad_norm
        step = c_library.Step(
            arrays=memory.address(table.arrays),
            grads=memory.address(places),
            options=memory.address(numbers),
            max_grad_norm=math.inf if limit is None else float(limit),
            measure=limit is not None or mode != "propagate",
            skip_nonfinite=mode != "propagate",
            grad_scale=None if scale is None else memory.address(scale),
            found_inf=None if told is None else memory.address(told),
            control=memory.address(self._control),
            threads=self.threads or 0,
        )
        table.plan.step(step)
        if not self.step_skipped:
            for state, made in zip(self.state, new):
                state.update(made)
        elif mode == "raise" and not found_inf:
            raise _nonfinite_error(views)

    def _mode(self) -> NonFinite:
        check_limit("max_grad_norm", self.max_grad_norm)
        check_choice("nonfinite", self.nonfinite, NONFINITE_MODES)
        return mode_of(self.nonfinite, self.max_grad_norm)

    def _numbers(self) -> NDArray[np.float64]:
        """The numbers of all options, in the order of the kernels."""
        self._check_options()
        numbers: list[float] = []
        for name, count in self._info.options.items():
            value = getattr(self, name)
            values = list(value) if count > 1 else [value]
            if len(values) != count:
                raise ValueError(f"Invalid {name} value: {value}; expected {count} numbers")
            numbers += map(float, values)
        return np.array(numbers)

    def _check_options(self) -> None:
        """Refuses options that the kernels don't check."""

    def _checked_grads(self, grads: Sequence[Any]) -> list[Array | None]:
        if len(grads) != len(self._arrays):
            raise ValueError(f"grads has {len(grads)} items; expected {len(self._arrays)}")
        views = []
        for index, (grad, param) in enumerate(zip(grads, self._arrays, strict=True)):
            array = None if grad is None else memory.view(f"grads[{index}]", grad)
            if array is not None:
                memory.check_like(f"grads[{index}]", array, param)
            views.append(array)
        return views

    def _new_state(self, index: int, used: list[str]) -> dict[str, Array]:
        """The arrays that the parameter's state lacks."""
        state, param = self.state[index], self._arrays[index]
        first = {**self._info.scalars, **self._info.states}
        first |= {name: getattr(self, option) for name, option in self.first_values.items()}
        made: dict[str, Array] = {}
        for name in (*self._info.scalars, *used):
            if name not in state:
                like = SCALAR if name in self._info.scalars else param
                made[name] = np.full_like(like, float(first[name]))
        return made


def _float32(value: float | None) -> Array | None:
    return None if value is None else np.array(value, np.float32)


def _nonfinite_error(grads: Sequence[Array | None]) -> NonFiniteGradientError:
    names, described = [], []
    for index, grad in enumerate(grads):
        if grad is None or np.isfinite(grad).all():
            continue
        infs, nans = int(np.isinf(grad).sum()), int(np.isnan(grad).sum())
        names.append(f"params[{index}]")
        described.append(f"{names[-1]} has {infs} inf and {nans} nan")
    return NonFiniteGradientError(names, "; ".join(described) or "their squares overflow")
