"""Writes what an optimizer's steps are like to a file or a logger, as they happen."""

from __future__ import annotations

import atexit
import math
import numbers
import os
import warnings
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from fusedopt.core import checks
from fusedopt.core.optimizer import FusedOptimizer
from fusedopt.monitoring.log_format import BY_SUFFIX, Header
from fusedopt.monitoring.log_writer import LogWriteError, LogWriter
from fusedopt.monitoring.telemetry_rows import select
from fusedopt.telemetry import PendingTelemetry, Telemetry

LOGGERS_PARAMS_EVERY = 100


class Monitor:
    """Writes a row for every step of an optimizer, without a line in the training loop.

        opt = fusedopt.FusedAdamW(model.named_parameters(), telemetry=64, max_grad_norm=1.0)
        monitor = fusedopt.Monitor(opt, "run.jsonl")

    Rows are copied from the device in the background, many at once: a step doesn't wait for them,
    and they arrive a little late. All are out after `flush()` or `close()`, at the end of a `with`
    block, and when Python exits. A step is written once.

    Args:
        optimizer: made with `telemetry=N`; name its parameters (`model.named_parameters()`).
        to: where to.

            * A path that ends in .jsonl or .csv. Lines are written whole: the log of a process
              that is killed is readable, but for a last line that may be cut. An existing log of
              the same parameters is continued (a cut line at its end is removed first) by later
              steps, or as `first_step` says; any other file is refused. While it is written, no
              other Monitor can open it.
            * A TensorBoard SummaryWriter, or whatever has its `add_scalar(tag, value, step)`.
            * A function of one argument, called with a dict of numbers for every step: what
              `telemetry().columns()` has, as in "step", "grad_norm", "grad_norm/layers.0.weight".
        every: how many steps to copy at once, at most N. None: N // 2.
        params_every: the measurements of every single parameter are written once in so many steps,
            and where a step was skipped or its norm is not finite. None: at each for a file, at
            every 100th for a logger.
        first_step: the number of the next step: of a resumed run, the one after its checkpoint's;
            of a new run, 1. Rows of an existing log from there on are replaced by those that come.
            None: as the optimizer counts, from 1 when it was made, or on from the largest "step" in
            a loaded checkpoint, which has no skipped steps; and nothing is replaced.

    A file that can't be written any more (a full disk) ends the log with a warning, not the run.
    What a logger raises comes out of `step()`.

    Steps that Python doesn't see, as those of a replayed CUDA graph, count for nobody: call
    `flush()` at least every N of them.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is refused.
        FileExistsError: the path is no log of these parameters, or has later steps and
            `first_step` is not given; it has not been touched.
    """

    def __init__(
        self,
        optimizer: FusedOptimizer,
        to: str | os.PathLike[str] | Callable[[dict[str, float]], object] | Any,
        *,
        every: int | None = None,
        params_every: int | None = None,
        first_step: int | None = None,
    ) -> None:
        self._output: Output | None = None
        if not isinstance(optimizer, FusedOptimizer):
            raise TypeError(
                f"optimizer is a {type(optimizer).__name__}; expected one of fusedopt's, made with "
                "telemetry=N"
            )
        now = optimizer.telemetry()
        assert optimizer._rings is not None
        kept = optimizer._rings.size
        every = checks.check_count("every", every) or max(1, kept // 2)
        if every > kept:
            raise ValueError(
                f"every is {every}, but the optimizer keeps {kept} steps (telemetry={kept}): the "
                f"others would be lost; expected at most {kept}"
            )
        params_every = checks.check_count("params_every", params_every)
        if first_step is not None:
            if isinstance(first_step, bool) or not isinstance(first_step, numbers.Integral):
                raise TypeError(f"first_step is a {type(first_step).__name__}; expected an int")
            if first_step < 0:
                raise ValueError(f"first_step is {first_step}; expected an int of 0 or more")
        written = optimizer._steps_taken()
        header = Header.of(now, type(optimizer).__name__)
        # A checkpoint's count may lack skipped steps: it alone doesn't say where a log goes on.
        own_steps = written if written > optimizer._loaded_steps() else 0
        output = _output_for(to, header, own_steps if first_step is None else None)
        self._output = output
        self._optimizer = optimizer
        self._every = every
        self._params_every = params_every or output.params_every
        self._written = written
        self._offset = 0 if first_step is None else first_step - written - 1
        self._numbers_given = first_step is not None
        self._taken = 0  # steps since the last copy was started
        self._pending: PendingTelemetry | None = None
        self._process = os.getpid()
        self._warned = False
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_load_state_dict_pre_hook(self._before_load),
            optimizer.register_load_state_dict_post_hook(self._after_load),
        ]
        _open_monitors.add(self)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def flush(self) -> None:
        """Writes all steps that were taken so far; waits for the device."""
        if self._is_open():
            self._take_rows()
            self._write_pending()
            if self._output is not None:
                self._output.flush()

    def close(self) -> None:
        """Writes all steps that were taken so far, and ends. A logger is left open."""
        if not self._is_open():
            return
        try:
            self.flush()
        finally:
            self._end()

    def _is_open(self) -> bool:
        """A forked child has the parent's monitor, and is not to write the parent's log."""
        return self._output is not None and self._process == os.getpid()

    def _end(self) -> None:
        output, self._output, self._pending = self._output, None, None
        _open_monitors.discard(self)
        for hook in self._hooks:
            hook.remove()
        if output is not None:
            output.close()

    @_disable_dynamo  # the step breaks a compiled graph as it is
    def _before_step(self, *_: object) -> None:
        # Counted before, as a step that raises has been taken too, and has no end to be counted at.
        if self._taken >= self._every:
            self._after_step()
        self._taken += 1

    @_disable_dynamo
    def _after_step(self, *_: object) -> None:
        if not self._is_open() or _is_capturing():
            return
        if self._taken >= self._every:
            self._take_rows()
        if self._pending is not None and self._pending.done():
            self._write_pending()

    @_disable_dynamo
    def _before_load(self, *_: object) -> None:
        self.flush()  # the optimizer forgets these steps

    @_disable_dynamo
    def _after_load(self, *_: object) -> None:
        """The optimizer counts on from its checkpoint; a number that was given counts on too."""
        counted = self._optimizer._steps_taken()
        if self._numbers_given:
            self._offset += self._written - counted
        self._written = counted

    def _take_rows(self) -> None:
        """Starts a copy; the one before it, started many steps ago, is to be written first."""
        self._write_pending()
        self._pending = self._optimizer.telemetry(non_blocking=True)
        self._taken = 0

    def _write_pending(self) -> None:
        pending, self._pending = self._pending, None
        if pending is None or self._output is None:
            return
        rows = pending.result()
        new = rows.step > self._written
        if not new.any():
            return
        rows = select(rows, new)
        missed = int(rows.step[0]) - self._written - 1
        if missed and not self._warned:
            self._warned = True
            warnings.warn(
                f"{missed} steps went by without this Monitor and are not in its log: were they "
                "replayed from a CUDA graph? Then call flush() more often",
                RuntimeWarning,
                stacklevel=2,
            )
        self._written = int(rows.step[-1])
        rows = replace(rows, step=rows.step + self._offset)
        with_params = rows.step % self._params_every == 0
        with_params |= rows.skipped | ~rows.grad_norm.isfinite()
        try:
            self._output.write(rows, with_params)
        except LogWriteError as error:
            self._end()
            warnings.warn(str(error), RuntimeWarning, stacklevel=2)


class Output(Protocol):
    """Where rows go.

    Attributes:
        params_every: at which steps it takes the parameters' measurements, if nobody says.
    """

    params_every: int

    def write(self, rows: Telemetry, with_params: Tensor) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class LoggerOutput:
    """A function that takes a dict for each step."""

    params_every = LOGGERS_PARAMS_EVERY

    def __init__(self, log: Callable[[dict[str, float]], object]) -> None:
        self._log = log

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
        super().__init__(self._add)
        self._writer = writer

    def _add(self, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            # An absent gradient is no point in a chart; a nan among a gradient's values is.
            if name != "step" and not (math.isnan(value) and _is_of_param(name)):
                self._writer.add_scalar(name, value, int(row["step"]))

    def flush(self) -> None:
        self._writer.flush()


def _output_for(to: Any, header: Header, last_step: int | None) -> Output:
    if isinstance(to, str | os.PathLike):
        path = Path(to)
        if path.suffix not in BY_SUFFIX:
            raise ValueError(f"{str(to)!r} ends in neither {' nor '.join(BY_SUFFIX)}")
        return LogWriter(path, header, last_step)
    if hasattr(to, "add_scalar"):
        return TensorBoardOutput(to)
    if callable(to):
        return LoggerOutput(to)
    raise TypeError(
        f"to is a {type(to).__name__}; expected a path, a SummaryWriter or a function of one dict"
    )


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


_open_monitors: weakref.WeakSet[Monitor] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for monitor in list(_open_monitors):
        monitor.close()
