"""Writes the file of a log line by line. It begins a file, continues a log, or refuses the file."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from fusedopt.monitoring.log_format import (
    BY_SUFFIX,
    LONGEST_LINE,
    FormatError,
    Header,
    format_of,
)
from fusedopt.monitoring.words import short_name
from fusedopt.telemetry import PARAM_COLUMNS, ParamTelemetry, Telemetry

try:
    import fcntl
except ModuleNotFoundError:  # on Windows, two Monitors that write to one path go unnoticed
    fcntl = None

BLOCK = 2**16


class LogWriteError(OSError):
    """The log can't be written any more. It ends with its last whole line."""


class LogWriter:
    """Appends to a log. Existing lines are checked and kept, except a cut last line.

    Args:
        last_step: the log may have steps up to this one. None: it may have any steps, and new rows
            replace the ones that they overlap with (see `log_rows.join`).

    Attributes:
        params_every: 1: a file gets the measurements of every parameter at every step.

    Raises:
        FileExistsError: the file is no log of these parameters, has later steps, or another writer.
    """

    params_every = 1

    def __init__(self, path: Path, header: Header, last_step: int | None = None) -> None:
        self.path = path
        self._format = BY_SUFFIX[path.suffix]
        self._optimizer = header.optimizer or ""
        self._header: Header | None = None  # the last one in the file, if more rows may follow it
        self._warned = False
        # Unbuffered, so that closing doesn't try again to write a line that failed.
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        try:
            self._lock()
            with open(path, "rb") as written:
                self._continue(written, header, last_step)
        except BaseException:
            self._file.close()
            raise

    def is_at(self, path: Path) -> bool:
        """Whether this writer writes to the file at this path."""
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), os.stat(path))
        except (OSError, ValueError):
            return False

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(
                f"{self.path} is being written by another Monitor: every rank and every optimizer "
                "needs a path of its own"
            ) from None
        except OSError:
            pass  # a file system without locks

    def _continue(self, file: BinaryIO, header: Header, last_step: int | None) -> None:
        """Checks everything before it changes anything."""
        first = file.readline(LONGEST_LINE)
        if first and format_of(first) is not self._format:
            raise FileExistsError(
                f"{self.path} is not a {self._format.name} log that a Monitor writes; it is left "
                "as it is"
            )
        if first.endswith(b"\n"):
            try:
                known = self._format.parse_header(first.decode().rstrip("\r\n"))
                there = self._last_step(file)
            except (FormatError, UnicodeDecodeError) as error:
                raise FileExistsError(
                    f"{self.path} is a damaged log and can't be continued: {error}; it is left as "
                    "it is"
                ) from None
            self._check_params(known, header)
            if last_step is not None and there > last_step:
                raise FileExistsError(
                    f"{self.path} has the steps of an earlier run, up to {there}: a resumed run "
                    "says which comes next, first_step=(the checkpoint's) + 1, and a new run that "
                    "is to replace them first_step=1; any other needs a path of its own. It is "
                    "left as it is"
                )
            if not self._format.takes_new_params:
                self._header = known
        self._file.truncate(_end_of_lines(file, os.fstat(file.fileno()).st_size))

    def _last_step(self, file: BinaryIO) -> int:
        """The number of the last step, or -1."""
        for line in _lines_from_end(file):
            if not self._format.is_header(line):
                return self._format.parse_row(line.decode().rstrip("\r\n"), None).step
        return -1

    def _check_params(self, known: Header, header: Header) -> None:
        for name, numel in known.params.items():
            expected = header.params.get(name)
            if expected is None or numel not in (0, expected):
                has = "no such parameter" if expected is None else f"{expected} elements"
                raise FileExistsError(
                    f"{self.path} is the log of another model: {short_name(name)!r} has {numel} "
                    f"elements there, and this optimizer has {has}; it is left as it is"
                )
        columns = (list(known.params), known.groups), (list(header.params), header.groups)
        if not self._format.takes_new_params and columns[0] != columns[1]:
            raise FileExistsError(
                f"{self.path} has columns for other parameters or param groups than this "
                "optimizer's; it is left as it is"
            )

    def write(self, rows: Telemetry, with_params: Tensor) -> None:
        """Writes rows. If that fails, it removes a partial line and raises LogWriteError."""
        header, lines = Header.of(rows, self._optimizer), []
        fits = self._header is not None and list(header.params) == list(self._header.params)
        if self._header is None or (self._format.takes_new_params and not fits):
            lines.append(self._format.header_line(header))
            self._header = header
        elif not self._format.takes_new_params:
            rows = self._in_columns_of(self._header, rows)
        lines += self._format.row_lines(rows, with_params)
        self._append("".join(f"{line}\n" for line in lines).encode())

    def _in_columns_of(self, header: Header, rows: Telemetry) -> Telemetry:
        """Rows with exactly the parameters and param groups that have columns."""
        new = [name for name in rows.params if name not in header.params]
        if new and not self._warned:
            self._warned = True
            warnings.warn(
                f"{self.path} has no columns for parameters that came later, as {new[0]!r}; a "
                ".jsonl log takes them",
                RuntimeWarning,
                stacklevel=2,
            )
        steps = len(rows.step)
        unknown = torch.full((steps,), torch.nan, dtype=torch.float64)
        absent = ParamTelemetry(0, *[unknown] * len(PARAM_COLUMNS))
        lr = torch.full((steps, header.groups or 0), torch.nan, dtype=torch.float64)
        shared = min(lr.shape[1], rows.lr.shape[1])
        lr[:, :shared] = rows.lr[:, :shared]
        return replace(rows, lr=lr, params={n: rows.params.get(n, absent) for n in header.params})

    def _append(self, data: bytes) -> None:
        size = os.fstat(self._file.fileno()).st_size
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(size)
            raise LogWriteError(f"{self.path} can't be written any more: {error}") from error

    def flush(self) -> None:
        """Does nothing: a written line is already with the operating system."""

    def close(self) -> None:
        if fcntl is not None and not self._file.closed:
            # A forked worker that still has the file would keep it locked.
            with contextlib.suppress(OSError):
                fcntl.flock(self._file, fcntl.LOCK_UN)
        self._file.close()


def _end_of_lines(file: BinaryIO, end: int) -> int:
    """The end of the last complete line before `end`."""
    while end > 0:
        start = max(0, end - BLOCK)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def _lines_from_end(file: BinaryIO) -> Iterator[bytes]:
    """The complete lines, the last one first.

    Raises:
        FormatError: a line is too long.
    """
    end = _end_of_lines(file, file.seek(0, os.SEEK_END))
    while end > 0:
        start = _end_of_lines(file, end - 1)
        if end - start > LONGEST_LINE:
            raise FormatError(f"a line longer than {LONGEST_LINE:,} bytes")
        file.seek(start)
        yield file.read(end - start)
        end = start
