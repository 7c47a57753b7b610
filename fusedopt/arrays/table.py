"""The addresses that a step passes to the kernels."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import numpy as np

from fusedopt.arrays import memory
from fusedopt.arrays.memory import Array
from fusedopt.core import c_library

State = dict[str, Array]


class Table:
    """Parameters and states of a rule, looked at anew when one of them is another array."""

    def __init__(self, rule: str, params: Sequence[Array]) -> None:
        """Raises TypeError or ValueError if a parameter is refused."""
        names = [f"params[{index}]" for index in range(len(params))]
        dtypes = [memory.dtype_code(*pair) for pair in zip(names, params)]
        for name, param in zip(names, params):
            memory.check_layout(name, param)
            memory.check_writable(name, param)
        self._params = params
        self._info = c_library.load().rules[rule]
        self._seen: list[Array | None] = []
        self._written = memory.Written(names, params)
        self._sizes = np.array([param.nbytes for param in params], np.int64)
        self.plan = c_library.Plan(rule, [param.size for param in params], dtypes)
        self.arrays = np.zeros(0, np.int64)  # per parameter: itself, its states, its scalars

    def look_at(self, states: Sequence[State], used: Sequence[str]) -> None:
        """Fills `arrays`. `used`: the names of the states that the rule uses.

        Raises:
            TypeError, ValueError: a state is refused.
        """
        columns = [name if name in used else "" for name in self._info.states]
        columns += self._info.scalars
        found: list[Array | None] = []
        for param, state in zip(self._params, states, strict=True):
            found.append(param)
            found += map(state.get, columns)
        if len(found) == len(self._seen) and all(map(operator.is_, found, self._seen)):
            return
        names, arrays = self._checked(found, columns)
        self._written = memory.Written(names, arrays)
        places = [0 if array is None else memory.address(array) for array in found]
        self.arrays = np.array(places, np.int64)
        self._seen = found

    def _checked(
        self, found: Sequence[Array | None], columns: Sequence[str]
    ) -> tuple[list[str], list[Array]]:
        """The arrays that there are, and their names."""
        names, arrays = [], []
        width = 1 + len(columns)
        for place, array in enumerate(found):
            index, column = divmod(place, width)
            if array is None:
                continue
            name = f"params[{index}]"
            if column > 0:
                name = f"state[{index}][{columns[column - 1]!r}]"
                is_scalar = columns[column - 1] in self._info.scalars
                memory.check_array(name, array)
                memory.check_like(name, array, SCALAR if is_scalar else self._params[index])
                memory.check_writable(name, array)
            names.append(name)
            arrays.append(array)
        return names, arrays

    def grads(self, grads: Sequence[Array | None]) -> Array:
        """The addresses of gradients; 0: there is none.

        Raises:
            ValueError: a gradient shares memory that the step writes.
        """
        places = np.array([0 if it is None else memory.address(it) for it in grads], np.int64)
        self._written.check_apart(places, self._sizes)
        return places


SCALAR = np.zeros((), np.float32)
