"""The places that a Monitor writes to: a function, a TensorBoard SummaryWriter, or a file."""

from __future__ import annotations

import math
import os
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from fusedopt.monitoring.log_format import BY_SUFFIX, Header
from fusedopt.monitoring.log_writer import LogWriter
from fusedopt.telemetry import Telemetry

LOGGERS_PARAMS_EVERY = 100
BOUND_METHODS = (types.MethodType, types.BuiltinMethodType)


class Output(Protocol):
    """A place that rows are written to.

    Attributes:
        params_every: the default for Monitor's argument: parameters' measurements are written at
            every step that this number divides.
    """

    params_every: int

    def write(self, rows: Telemetry, with_params: Tensor) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class LoggerOutput:
    """A function that is called with a dict for each step."""

    params_every = LOGGERS_PARAMS_EVERY

    def __init__(self, log: Callable[[dict[str, float]], object], to: Any) -> None:
        self._log = log
        self.to = to

    def write(self, rows: Telemetry, with_params: Tensor) -> None:
        columns = {name: column.tolist() for name, column in rows.columns().items()}
        short = [name for name in columns if not _is_of_param(name)]
        for i, detailed in enumerate(with_params.tolist()):
            names = columns if detailed else short
            row = {name: columns[name][i] for name in names}
            self._log({**row, "skipped": float(row["skipped"])})

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def _is_of_param(column: str) -> bool:
    return "/" in column and not column.startswith("lr/")


class TensorBoardOutput(LoggerOutput):
    """A SummaryWriter."""

    def __init__(self, writer: Any) -> None:
        super().__init__(self._add, writer)
        self._writer = writer

    def _add(self, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            # A missing gradient makes no point in a chart; a nan in a gradient does.
            if name != "step" and not (math.isnan(value) and _is_of_param(name)):
                self._writer.add_scalar(name, value, int(row["step"]))

    def flush(self) -> None:
        self._writer.flush()


def output_for(to: Any, header: Header, last_step: int | None) -> Output:
    if isinstance(to, str | os.PathLike):
        path = Path(to)
        if path.suffix not in BY_SUFFIX:
            raise ValueError(f"{str(to)!r} ends in neither {' nor '.join(BY_SUFFIX)}")
        return LogWriter(path, header, last_step)
    if hasattr(to, "add_scalar"):
        return TensorBoardOutput(to)
    if callable(to):
        return LoggerOutput(to, to)
    raise TypeError(
        f"to is a {type(to).__name__}; expected a path, a SummaryWriter or a function of one dict"
    )


def writes_to(output: Output, to: Any) -> bool:
    """Whether an open output writes to the file or the logger `to`."""
    if isinstance(output, LogWriter):
        return isinstance(to, str | os.PathLike) and output.is_at(Path(to))
    if isinstance(output, LoggerOutput):
        # Each look-up of a bound method makes a new object, but an equal one.
        same_method = isinstance(to, BOUND_METHODS) and output.to == to
        return output.to is to or same_method
    return False
