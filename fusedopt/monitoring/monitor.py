"""Writes the telemetry of an optimizer's steps to a file or a logger while it trains."""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import multiprocessing.util
import numbers
import os
import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch._compile import _disable_dynamo

from fusedopt.core import check_settings
from fusedopt.core.optimizer import FusedOptimizer
from fusedopt.monitoring.log_format import Header
from fusedopt.monitoring.log_writer import LogWriteError
from fusedopt.monitoring.outputs import Output, output_for, writes_to
from fusedopt.monitoring.telemetry_rows import select
from fusedopt.telemetry import PendingTelemetry

EXIT_SECONDS = 10.0


class Monitor:
    """Writes a row for every step of an optimizer. The training loop stays as it is.

        opt = fusedopt.FusedAdamW(model.named_parameters(), telemetry=64, max_grad_norm=1.0)
        monitor = fusedopt.Monitor(opt, "run.jsonl")

    Rows are copied from the device in the background, many at once. A step doesn't wait for them,
    and they arrive a little late. All rows are written after `flush()` or `close()`, at the end of
    a `with` block, and when Python exits. Several threads may step, flush and close.

    A notebook's cell can be run again: an open Monitor of the same optimizer that writes to the
    same file or logger is closed, and the new one continues its numbering. A copy of a Monitor, as
    in a copy of a module that has one, is closed and writes nothing. So is a Monitor in a forked
    process.

    Args:
        optimizer: made with `telemetry=N`; name its parameters (`model.named_parameters()`).
        to: one of these.

            * A path that ends in .jsonl or .csv. Lines are written whole: if the process is killed,
              the log is readable, except perhaps the last line. An existing log of the same
              parameters is continued by later steps, or as `first_step` says; a cut line at its
              end is removed first. Any other file is refused. While a Monitor writes a file, no
              other Monitor can open it.
            * A TensorBoard SummaryWriter, or any object with its `add_scalar(tag, value, step)`.
            * A function of one argument. It is called for every step with a dict of numbers, by the
              names of `telemetry().columns()`: "step", "grad_norm", "grad_norm/layers.0.weight".
        every: how many steps to copy at once, at most N. None: N // 2.
        params_every: the measurements of each parameter are written once in so many steps, and for
            every step that was skipped or whose norm is not finite. None: at every step for a file,
            at every 100th for a logger.
        first_step: the number of the next step. For a new run it is 1, for a resumed run the number
            after its checkpoint's. New rows replace rows of an existing log from there on. None:
            the optimizer's own count, and nothing is replaced. The optimizer counts from 1, or from
            the largest "step" in a loaded checkpoint, which doesn't count skipped steps. A Monitor
            that takes over from another one continues its count.

    A file that can't be written any more (a full disk) ends the log with a warning, not the run.
    An exception of a logger comes out of `step()`.

    A Monitor can't count steps that Python doesn't see, such as replays of a CUDA graph. Then call
    `flush()` at least once in N steps.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is refused.
        FileExistsError: the path is no log of these parameters; or it has later steps and
            `first_step` is not given; or a Monitor of another optimizer or process is writing it.
            It has not been touched.
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
        every = check_settings.check_count("every", every) or max(1, kept // 2)
        if every > kept:
            raise ValueError(
                f"every is {every}, but the optimizer keeps {kept} steps (telemetry={kept}): the "
                f"others would be lost; expected at most {kept}"
            )
        params_every = check_settings.check_count("params_every", params_every)
        _check_first_step(first_step)
        counted = optimizer._steps_taken()
        offset, numbers_given = 0, first_step is not None
        if first_step is not None:
            offset = first_step - counted - 1
        output, before = None, _open_monitor(to, optimizer)
        if before is not None:
            output = before._hand_over()
            if first_step is None:
                offset, numbers_given = before._offset, before._numbers_given
        if output is None:
            header = Header.of(now, type(optimizer).__name__)
            # A checkpoint's count may lack skipped steps, so it can't say where a log continues.
            own_steps = counted if counted > optimizer._loaded_steps() else 0
            output = output_for(to, header, own_steps if first_step is None else None)
        self._output = output
        self._optimizer = optimizer
        self._every = every
        self._params_every = params_every or output.params_every
        self._written = counted  # the last written step, by the optimizer's count
        self._offset = offset
        self._numbers_given = numbers_given
        self._taken = 0  # steps since the last copy was started
        self._pending: PendingTelemetry | None = None
        self._process = os.getpid()
        self._warned = False
        self._lock = threading.RLock()  # steps, flush() and close() may come from several threads
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_load_state_dict_pre_hook(self._before_load),
            optimizer.register_load_state_dict_post_hook(self._after_load),
        ]
        _open_monitors.add(self)
        _close_with_this_process()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, by `copy`, `pickle` or `torch.save`, is closed and has no optimizer."""
        return _closed_monitor, ()

    def flush(self) -> None:
        """Writes all steps so far. Waits for the device."""
        if self._is_open():
            with self._lock:
                self._take_rows()
                self._write_pending()
                if self._output is not None:
                    self._output.flush()

    def close(self) -> None:
        """Writes all steps so far, and ends. A logger stays open."""
        if not self._is_open():
            return
        with self._lock:
            try:
                self.flush()
            finally:
                self._end()

    def _close_at_exit(self) -> None:
        """As `close()`, but doesn't wait long for another thread that is in this Monitor."""
        if not self._is_open():
            return
        if not self._lock.acquire(timeout=EXIT_SECONDS):
            warnings.warn(
                f"Python exits while a thread has been in a Monitor for {EXIT_SECONDS:g} seconds; "
                "its last steps are not written",
                RuntimeWarning,
                stacklevel=2,
            )
            return
        try:
            self.close()
        finally:
            self._lock.release()

    def _is_open(self) -> bool:
        """Whether this process may write. A forked child must not write its parent's log."""
        return self._output is not None and self._process == os.getpid()

    def _hand_over(self) -> Output | None:
        """Ends, and returns the output for another Monitor. None if the output has ended."""
        with self._lock:
            self.flush()
            output, self._output = self._output, None
            self._end()
        return output

    def _end(self) -> None:
        output, self._output, self._pending = self._output, None, None
        _open_monitors.discard(self)
        for hook in self._hooks:
            hook.remove()
        if output is not None:
            output.close()

    @_disable_dynamo  # the step breaks a compiled graph anyway
    def _before_step(self, *_: object) -> None:
        if not self._is_open():
            return
        with self._lock:
            # Count before the step: one that raises also counts, but calls no hook at its end.
            if self._taken >= self._every:
                self._after_step()
            self._taken += 1

    @_disable_dynamo
    def _after_step(self, *_: object) -> None:
        if not self._is_open() or _is_capturing():
            return
        with self._lock:
            if self._taken >= self._every:
                self._take_rows()
            if self._pending is not None and self._pending.done():
                self._write_pending()

    @_disable_dynamo
    def _before_load(self, *_: object) -> None:
        self.flush()  # the optimizer forgets these steps

    @_disable_dynamo
    def _after_load(self, *_: object) -> None:
        """Continues the count from the checkpoint, or from a given `first_step`."""
        if not self._is_open():
            return
        with self._lock:
            counted = self._optimizer._steps_taken()
            if self._numbers_given:
                self._offset += self._written - counted
            self._written = counted

    def _take_rows(self) -> None:
        """Starts a copy, after the rows of the copy before it are written."""
        self._write_pending()
        if self._output is None:  # the log has come to its end
            return
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


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _check_first_step(first_step: Any) -> None:
    if first_step is None:
        return
    if isinstance(first_step, bool) or not isinstance(first_step, numbers.Integral):
        raise TypeError(f"first_step is a {type(first_step).__name__}; expected an int")
    if first_step < 0:
        raise ValueError(f"first_step is {first_step}; expected an int of 0 or more")


_open_monitors: weakref.WeakSet[Monitor] = weakref.WeakSet()


def _open_monitor(to: Any, optimizer: FusedOptimizer) -> Monitor | None:
    """The open Monitor of this process that writes the same optimizer's steps to this place.

    Raises:
        FileExistsError: one writes another optimizer's steps to this file.
    """
    if _writing(to):
        gc.collect()  # a Monitor and its optimizer, both dropped, may only wait to be collected
    monitors = _writing(to)
    for monitor in monitors:
        if monitor._optimizer is optimizer:
            return monitor
    if monitors and isinstance(to, str | os.PathLike):
        raise FileExistsError(
            f"{to} is being written by another Monitor of this process, for another optimizer (a "
            f"{type(monitors[0]._optimizer).__name__}): call that Monitor's close() first, or give "
            "this one a path of its own"
        )
    return None


def _writing(to: Any) -> list[Monitor]:
    return [
        monitor
        for monitor in list(_open_monitors)
        if monitor._is_open() and monitor._output is not None and writes_to(monitor._output, to)
    ]


def _closed_monitor() -> Monitor:
    monitor = Monitor.__new__(Monitor)
    monitor._output = None
    return monitor


@atexit.register
def _close_all() -> None:
    for monitor in list(_open_monitors):
        try:
            monitor._close_at_exit()
        except Exception as error:  # a logger's; close the other Monitors as well
            sys.excepthook(type(error), error, error.__traceback__)


_processes: set[int] = set()  # the processes in which multiprocessing closes the Monitors


def _close_with_this_process() -> None:
    """A process that multiprocessing has forked doesn't run `atexit`."""
    if multiprocessing.parent_process() is not None and os.getpid() not in _processes:
        _processes.add(os.getpid())
        multiprocessing.util.Finalize(None, _close_all, exitpriority=100)
