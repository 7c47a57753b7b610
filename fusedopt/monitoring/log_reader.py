"""Reads the log of a run, whole or as it grows, up to where it is damaged."""

from __future__ import annotations

import math
import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fusedopt.monitoring.log_format import Format, FormatError, Header, Row, format_of
from fusedopt.monitoring.telemetry_rows import concatenate, from_matrix
from fusedopt.telemetry import PARAM_COLUMNS, STEP_COLUMNS, Telemetry

BATCH_ROWS = 1024
BATCH_NUMBERS = 2**20  # a batch of many parameters has fewer rows
LONGEST_LINE = 2**26
START = 4096  # that many bytes tell one run's file from another's: the header has a date


class NotALogError(ValueError):
    """A file that no Monitor has written."""


@dataclass(frozen=True)
class RunLog:
    """What a log holds.

    Attributes:
        telemetry: all of its steps, as `opt.telemetry()` returns the last ones. Of a CSV, `numel`
            is 0: it doesn't say. A step whose parameters were not asked for has nan there.
        optimizer: the name of the optimizer's class; None where the log doesn't say.
        damage: None, or the line at which reading had to stop, and why.
    """

    telemetry: Telemetry
    optimizer: str | None
    damage: str | None


def read_log(path: str | os.PathLike[str]) -> RunLog:
    """Reads what `fusedopt.Monitor` wrote, JSONL or CSV, up to where it is damaged.

    Raises:
        NotALogError: it is something else.
        OSError: it can't be read.
    """
    reader = LogReader(path)
    rows = concatenate(list(reader.batches()))
    return RunLog(rows, reader.header.optimizer if reader.header else None, reader.damage)


class LogReader:
    """Reads a log in batches, and what is new in it later.

    Attributes:
        header: that of the last row that was read, or None.
        damage: None, or the line at which reading had to stop, and why.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file_id: tuple[int, int] | None = None
        self._start = b""
        self._forget()

    def _forget(self) -> None:
        self.header: Header | None = None
        self.damage: str | None = None
        self._format: Format | None = None
        self._offset = self._line = self._rows = 0

    def was_replaced(self) -> bool:
        """Whether the file is another one by now, or was cut; it is then read from its start."""
        with open(self.path, "rb") as file:
            start, status = file.read(START), os.fstat(file.fileno())
        file_id = status.st_dev, status.st_ino
        known = self._file_id is not None
        replaced = known and (
            file_id != self._file_id
            or status.st_size < self._offset
            or not start.startswith(self._start)
        )
        self._file_id, self._start = file_id, start
        if replaced:
            self._forget()
        return replaced

    def batches(self, growing: bool = False) -> Iterator[Telemetry]:
        """The rows that were not read yet, up to a damaged line.

        Args:
            growing: the file is being written; a last line without an end is none yet.

        Raises:
            NotALogError: it is no log, or nothing but the beginning of one.
        """
        with open(self.path, "rb") as file:
            if self._format is None:
                self._format = format_of(file.read(64))
                if self._format is None:
                    empty = file.tell() == 0
                    if empty and growing:
                        return
                    reason = "is empty" if empty else "is not a log that fusedopt.Monitor writes"
                    raise NotALogError(f"{self.path} {reason}")
            file.seek(self._offset)
            yield from self._rest(file, self._format, growing)

    def _rest(self, file, known: Format, growing: bool) -> Iterator[Telemetry]:
        batch = _Batch()
        while self.damage is None and (line := file.readline(LONGEST_LINE)):
            whole = line.endswith(b"\n")
            if not whole and growing and len(line) < LONGEST_LINE:
                break
            try:
                if not whole:
                    raise FormatError("cut off in the middle")
                text = line.decode().rstrip("\r\n")
                if self.header is None or known.is_header(line):
                    header = known.parse_header(text)
                    yield from batch.take()
                    self.header, batch = header, _Batch()
                else:
                    row = known.parse_row(text, self.header)
                    if not batch.has_room_for(row):
                        yield from batch.take()
                        batch = _Batch()
                    batch.add(row, self.header)
                    self._rows += 1
            except (FormatError, UnicodeDecodeError) as error:
                reason = str(error) if isinstance(error, FormatError) else "not UTF-8"
                if self.header is None:
                    raise NotALogError(f"{self.path}, line 1: {reason}") from None
                self.damage = self._describe(reason, _count_lines(file))
                break
            self._offset += len(line)
            self._line += 1
        yield from batch.take()

    def _describe(self, reason: str, later: int) -> str:
        rest = f" and the {later} after it are" if later else " is"
        return (
            f"{self.path}, line {self._line + 1}: {reason}; this line{rest} left out, "
            f"the {self._rows} steps before it were read"
        )


class _Batch:
    """Rows of one header, on their way to tensors."""

    def __init__(self) -> None:
        self._header: Header | None = None
        self._groups = 0
        self._steps: list[int] = []
        self._readings, self._lr, self._params = array("d"), array("d"), array("d")

    def has_room_for(self, row: Row) -> bool:
        if not self._steps:
            return True
        fits = len(self._steps) < BATCH_ROWS and len(self._params) < BATCH_NUMBERS
        return fits and len(row.lr) == self._groups

    def add(self, row: Row, header: Header) -> None:
        self._header, self._groups = header, len(row.lr)
        self._steps.append(row.step)
        self._readings.extend(row.readings)
        self._lr.extend(row.lr)
        width = len(PARAM_COLUMNS) * len(header.params)
        self._params.extend(array("d", [math.nan]) * width if row.params is None else row.params)

    def take(self) -> Iterator[Telemetry]:
        if self._header is None:
            return
        steps, params = len(self._steps), self._header.params
        yield from_matrix(
            torch.tensor(self._steps),
            _tensor(self._readings, (steps, len(STEP_COLUMNS))),
            _tensor(self._lr, (steps, self._groups)),
            params,
            _tensor(self._params, (steps, len(PARAM_COLUMNS), len(params))),
        )


def _tensor(values: array[float], shape: tuple[int, ...]) -> Tensor:
    if not values:
        return torch.empty(shape, dtype=torch.float64)
    return torch.frombuffer(values, dtype=torch.float64).view(shape)


def _count_lines(file) -> int:
    """How many more lines there are, whole or not."""
    lines, last = 0, b"\n"
    while block := file.read(2**20):
        lines, last = lines + block.count(b"\n"), block
    return lines + (not last.endswith(b"\n"))
