"""Reads the log of a run, whole or as it grows, up to a damaged line."""

from __future__ import annotations

import math
import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from fusedopt.monitoring.log_format import (
    LONGEST_LINE,
    Format,
    FormatError,
    Header,
    Row,
    format_of,
)
from fusedopt.monitoring.log_rows import Block, Rows, join
from fusedopt.telemetry import PARAM_COLUMNS, STEP_COLUMNS, Telemetry

BATCH_ROWS = 1024
BATCH_NUMBERS = 2**20  # a batch of many parameters has fewer rows
LEAST_NUMBERS = 2**22  # a table of learning rates may always have so many
START = 4096  # so many bytes identify a run: the header has a date


class NotALogError(ValueError):
    """The file was not written by a Monitor."""


@dataclass(frozen=True)
class RunLog:
    """The contents of a log.

    Attributes:
        telemetry: all steps, in the form of `opt.telemetry()`. `numel` is 0 for a CSV, which
            doesn't hold it. A step without logged parameters has nan for them.
        optimizer: the name of the optimizer's class; None if the log doesn't hold it.
        damage: None, or the line at which reading had to stop, and why.
    """

    telemetry: Telemetry
    optimizer: str | None
    damage: str | None


def read_log(path: str | os.PathLike[str]) -> RunLog:
    """Reads a log of `fusedopt.Monitor`, JSONL or CSV, up to a damaged line.

    Raises:
        NotALogError: the file is no log.
        OSError: the file can't be read.
    """
    reader = LogReader(path)
    rows = join(list(_in_proportion(reader)))
    optimizer = reader.header.optimizer if reader.header else None
    return RunLog(rows.telemetry(), optimizer, reader.damage)


def _in_proportion(reader: LogReader) -> Iterator[Rows]:
    """The batches; refuses a table of learning rates that is far larger than its file."""
    steps, groups = 0, 0
    for rows in reader.batches():
        steps, groups = steps + len(rows.step), max(groups, rows.lr.shape[1])
        if steps * groups > LEAST_NUMBERS + reader.bytes_read:
            raise NotALogError(
                f"{reader.path}: a step with {groups:,} learning rates makes a table of {steps:,} "
                "steps too large; plot and watch can show this log"
            )
        yield rows


class LogReader:
    """Reads a log in batches, and later its new lines.

    Attributes:
        header: the header of the last row that was read, or None.
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

    @property
    def bytes_read(self) -> int:
        """The number of bytes in lines that are neither cut nor damaged."""
        return self._offset

    def was_replaced(self) -> bool:
        """Whether the file was replaced or cut. If so, the next read begins at its start."""
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

    def batches(self, growing: bool = False) -> Iterator[Rows]:
        """The rows that were not read yet, up to a damaged line.

        Args:
            growing: the file is being written: a last line without an end is not read yet.

        Raises:
            NotALogError: the file is no log, or only the beginning of one.
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

    def _rest(self, file: BinaryIO, known: Format, growing: bool) -> Iterator[Rows]:
        batch = _Batch(self.header)
        while self.damage is None and (line := file.readline(LONGEST_LINE)):
            ended = line.endswith(b"\n")
            if not ended and growing and len(line) < LONGEST_LINE:
                break
            try:
                if not ended:
                    cut = len(line) < LONGEST_LINE
                    too_long = f"longer than {LONGEST_LINE:,} bytes"
                    raise FormatError("cut off in the middle" if cut else too_long)
                text = line.decode().rstrip("\r\n")
                if self.header is None or known.is_header(line):
                    self.header = known.parse_header(text)
                    batch.begin_block(self.header)
                else:
                    row = known.parse_row(text, self.header)
                    if not batch.has_room_for(row):
                        yield batch.rows()
                        batch = _Batch(self.header)
                    batch.add(row)
                    self._rows += 1
            except (FormatError, UnicodeDecodeError) as error:
                reason = str(error) if isinstance(error, FormatError) else "not UTF-8"
                if self.header is None:
                    raise NotALogError(f"{self.path}, line 1: {reason}") from None
                self.damage = self._describe(reason, max(0, _count_lines(file) - (not ended)))
                break
            self._offset += len(line)
            self._line += 1
        yield batch.rows()

    def _describe(self, reason: str, later: int) -> str:
        rest = f" and the {later} after it are" if later else " is"
        return (
            f"{self.path}, line {self._line + 1}: {reason}; this line{rest} left out, "
            f"the {self._rows} steps before it were read"
        )


class _Batch:
    """Lines that are read but are not tensors yet."""

    def __init__(self, header: Header | None) -> None:
        self._steps: list[int] = []
        self._readings = array("d")
        self._lr: list[array[float]] = []
        self._groups = 0
        self._numbers = 0
        self._blocks: list[_OpenBlock] = []
        if header is not None:
            self.begin_block(header)

    def begin_block(self, header: Header) -> None:
        self._blocks.append(_OpenBlock(header))

    def has_room_for(self, row: Row) -> bool:
        if not self._steps:
            return True
        rows, groups = len(self._steps) + 1, max(self._groups, len(row.lr))
        few = rows <= BATCH_ROWS and len(self._blocks) <= BATCH_ROWS
        return few and self._numbers + rows * groups <= BATCH_NUMBERS

    def add(self, row: Row) -> None:
        if row.params is not None:
            self._blocks[-1].rows.append(len(self._steps))
            self._blocks[-1].values.extend(row.params)
            self._numbers += len(row.params)
        self._steps.append(row.step)
        self._readings.extend(row.readings)
        self._lr.append(row.lr)
        self._groups = max(self._groups, len(row.lr))

    def rows(self) -> Rows:
        steps = len(self._steps)
        lr = array("d")
        for numbers in self._lr:
            lr.extend(numbers)
            lr.extend([math.nan] * (self._groups - len(numbers)))
        return Rows(
            torch.tensor(self._steps, dtype=torch.int64),
            _tensor(self._readings, (steps, len(STEP_COLUMNS))),
            _tensor(lr, (steps, self._groups)),
            [block.close() for block in self._blocks],
        )


class _OpenBlock:
    """Rows of one header."""

    def __init__(self, header: Header) -> None:
        self._sizes = header.params
        self.rows: list[int] = []
        self.values = array("d")

    def close(self) -> Block:
        shape = (len(self.rows), len(PARAM_COLUMNS), len(self._sizes))
        rows = torch.tensor(self.rows, dtype=torch.int64)
        return Block(self._sizes, rows, _tensor(self.values, shape))


def _tensor(values: array[float], shape: tuple[int, ...]) -> Tensor:
    if not values:
        return torch.empty(shape, dtype=torch.float64)
    return torch.frombuffer(values, dtype=torch.float64).view(shape)


def _count_lines(file: BinaryIO) -> int:
    """The number of remaining lines, whole or not."""
    lines, last = 0, b"\n"
    while block := file.read(2**20):
        lines, last = lines + block.count(b"\n"), block
    return lines + (not last.endswith(b"\n"))
