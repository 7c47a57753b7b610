"""The lines of a run's log, written and read, as JSONL and as CSV.

JSONL: a header, then a line for every step; another header wherever the parameters change and
wherever the run was resumed. Every line is strict JSON: nan is `null`, infinity is `"inf"`.

    {"fusedopt_log":1,"date":"2026-11-23T08:00:00Z","optimizer":"FusedAdamW",
     "params":["0.weight","0.bias"],"numel":[4,2]}
    {"step":1,"grad_norm":7.5,"clip_coef":0.13,"skipped":false,"lr":[0.1],
     "params":{"grad_norm":[1.7,2.0],"grad_max":[1.1,1.7],"infs":[0,0],...}}

The arrays in `params` are in the header's order; see `telemetry.PARAM_COLUMNS`. A line has no
`params` if the parameters were not logged at that step.

CSV: the columns of `Telemetry.columns()`. `skipped` is 0 or 1, nan and inf are written as words,
and a cell is empty if its value was not logged.

Numbers have 7 significant digits; steps and counts have all digits.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, NamedTuple

from torch import Tensor

from fusedopt.monitoring.telemetry_rows import param_matrix
from fusedopt.monitoring.words import short_value
from fusedopt.telemetry import PARAM_COLUMNS, STEP_COLUMNS, Telemetry

VERSION = 1
COUNTS = ("infs", "nans")
NUMBER = "%.7g"
LONGEST_LINE = 2**26  # bytes
MOST_STEPS = 2**48  # exact in float64, with room for fractions
CSV_PARAM_COLUMNS = (*PARAM_COLUMNS, "update_ratio")

NONFINITE = {None: math.nan, "inf": math.inf, "-inf": -math.inf}


class FormatError(ValueError):
    """The fault of a line."""


@dataclass(frozen=True)
class Header:
    """A header, which describes the rows below it.

    Attributes:
        params: the parameters by name, with their numbers of elements (0 where not known).
        optimizer: the name of its class, or None.
        groups: the number of learning rates in a row; None: any number.
    """

    params: dict[str, int]
    optimizer: str | None = None
    groups: int | None = None

    @classmethod
    def of(cls, rows: Telemetry, optimizer: str) -> Header:
        sizes = {name: p.numel for name, p in rows.params.items()}
        return cls(sizes, optimizer, rows.lr.shape[1])


class Row(NamedTuple):
    """One step."""

    step: int
    readings: array[float]  # see `telemetry.STEP_COLUMNS`
    lr: array[float]
    params: array[float] | None  # the first column of all parameters, then the second, ...


class Jsonl:
    """See the module's docstring."""

    name = "JSONL"
    signature = b'{"fusedopt_log":'
    takes_new_params = True

    def header_line(self, header: Header) -> str:
        content = {
            "fusedopt_log": VERSION,
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "optimizer": header.optimizer,
            "params": list(header.params),
            "numel": list(header.params.values()),
        }
        return json.dumps(content, separators=(",", ":"), allow_nan=False)

    def row_lines(self, rows: Telemetry, with_params: Tensor) -> Iterator[str]:
        short = f'{{"step":%d,"grad_norm":{NUMBER},"clip_coef":{NUMBER},"skipped":%s'
        short += f',"lr":[{_numbers(NUMBER, rows.lr.shape[1])}]'
        columns = ",".join(
            f'"{name}":[{_numbers(_style(name), len(rows.params))}]' for name in PARAM_COLUMNS
        )
        whole = short + ',"params":{' + columns + "}}"
        short += "}"
        params = param_matrix(rows)
        for i, (step, norm, coef, skipped, detailed) in enumerate(
            zip(
                rows.step.tolist(),
                rows.grad_norm.tolist(),
                rows.clip_coef.tolist(),
                rows.skipped.tolist(),
                with_params.tolist(),
            )
        ):
            values = [step, norm, coef, "true" if skipped else "false", *rows.lr[i].tolist()]
            if detailed:
                line = whole % (*values, *params[i].flatten().tolist())
            else:
                line = short % tuple(values)
            yield re.sub(r"-?\binf\b", r'"\g<0>"', re.sub(r"-?\bnan\b", "null", line))

    def is_header(self, line: bytes) -> bool:
        return line.startswith(self.signature)

    def parse_header(self, line: str) -> Header:
        content = _parse_json(line)
        version, names, sizes = (content.get(key) for key in ("fusedopt_log", "params", "numel"))
        if version != VERSION:
            raise FormatError(f"version {short_value(version)} of the format; expected {VERSION}")
        if not isinstance(names, list) or not isinstance(sizes, list) or len(names) != len(sizes):
            raise FormatError("a header without its parameters")
        if not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
            raise FormatError("a header whose parameters have no names of their own")
        if not all(isinstance(size, int) and 0 <= size < 2**63 for size in sizes):
            raise FormatError("a header whose parameters have no sizes")
        optimizer = content.get("optimizer")
        return Header(dict(zip(names, sizes)), optimizer if isinstance(optimizer, str) else None)

    def parse_row(self, line: str, header: Header | None) -> Row:
        content = _parse_json(line)
        step = content.get("step")
        if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < MOST_STEPS:
            raise FormatError("no number of a step")
        skipped = content.get("skipped")
        if not isinstance(skipped, bool):
            raise FormatError("no word on whether the step was skipped")
        norm, coef = _floats([content.get("grad_norm"), content.get("clip_coef")], "its readings")
        lr = _floats(content.get("lr"), "lr")
        params = content.get("params")
        if params is None or header is None:
            return Row(step, array("d", (norm, coef, skipped)), lr, None)
        if not isinstance(params, dict):
            raise FormatError("params is no object")
        values = array("d")
        for column in PARAM_COLUMNS:
            numbers = _floats(params.get(column), column)
            if len(numbers) != len(header.params):
                raise FormatError(
                    f"{len(numbers)} values of {column} for {len(header.params)} parameters"
                )
            values.extend(numbers)
        return Row(step, array("d", (norm, coef, skipped)), lr, values)


class Csv:
    """See the module's docstring."""

    name = "CSV"
    signature = ",".join(("step", *STEP_COLUMNS, "lr/0")).encode()
    takes_new_params = False

    def header_line(self, header: Header) -> str:
        return _csv_line(self._columns(header))

    @staticmethod
    def _columns(header: Header) -> list[str]:
        """As in `Telemetry.columns()`."""
        lrs = [f"lr/{group}" for group in range(header.groups or 0)]
        params = [f"{column}/{name}" for name in header.params for column in CSV_PARAM_COLUMNS]
        return ["step", *STEP_COLUMNS, *lrs, *params]

    def row_lines(self, rows: Telemetry, with_params: Tensor) -> Iterator[str]:
        readings = ["%d", NUMBER, NUMBER, "%d", *[NUMBER] * rows.lr.shape[1]]
        short = ",".join(readings) + "," * (len(CSV_PARAM_COLUMNS) * len(rows.params))
        styles = [_style(column) for column in CSV_PARAM_COLUMNS] * len(rows.params)
        whole = ",".join(readings + styles)
        columns = [column.tolist() for column in rows.columns().values()]
        for detailed, values in zip(with_params.tolist(), zip(*columns)):
            yield whole % values if detailed else short % values[: len(readings)]

    def is_header(self, line: bytes) -> bool:
        return line.startswith(self.signature)

    def parse_header(self, line: str) -> Header:
        columns = _parse_csv(line)
        groups = sum(column.startswith("lr/") for column in columns)
        first = columns[1 + len(STEP_COLUMNS) + groups :: len(CSV_PARAM_COLUMNS)]
        names = [column.removeprefix(f"{PARAM_COLUMNS[0]}/") for column in first]
        header = Header(dict.fromkeys(names, 0), None, groups)
        if self._columns(header) != columns:
            raise FormatError("a header with other columns than a log has")
        return header

    def parse_row(self, line: str, header: Header | None) -> Row:
        cells = _parse_csv(line)
        start = 1 + len(STEP_COLUMNS)
        if header is not None:
            columns = start + (header.groups or 0) + len(CSV_PARAM_COLUMNS) * len(header.params)
            if len(cells) != columns:
                raise FormatError(f"{len(cells)} cells; expected {columns}")
        try:
            step = int(cells[0])
            readings = array("d", map(float, cells[1:start]))
        except (ValueError, IndexError):
            raise FormatError("a cell that is no number") from None
        if not 0 <= step < MOST_STEPS or readings[-1] not in (0, 1):
            raise FormatError("a step or a flag that can't be")
        if header is None:
            return Row(step, readings, array("d"), None)
        end = start + (header.groups or 0)
        try:
            lr = array("d", map(float, cells[start:end]))
            if not any(cells[end:]):
                return Row(step, readings, lr, None)
            kept = (cells[end + i :: len(CSV_PARAM_COLUMNS)] for i in range(len(PARAM_COLUMNS)))
            params = array("d", (float(cell) for column in kept for cell in column))
        except ValueError:
            raise FormatError("a cell that is no number") from None
        return Row(step, readings, lr, params)


Format = Jsonl | Csv
BY_SUFFIX: dict[str, Format] = {".jsonl": Jsonl(), ".csv": Csv()}


def format_of(start: bytes) -> Format | None:
    """The format of a file that starts with these bytes. None if the file is no log.

    A file that ends inside a format's signature counts as that format.
    """
    for known in BY_SUFFIX.values():
        if start and start[: len(known.signature)] == known.signature[: len(start)]:
            return known
    return None


def _style(column: str) -> str:
    return "%.17g" if column in COUNTS else NUMBER


def _numbers(style: str, count: int) -> str:
    return ",".join([style] * count)


def _parse_json(line: str) -> dict[str, Any]:
    try:
        content = json.loads(line, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise FormatError("not JSON") from None
    if not isinstance(content, dict):
        raise FormatError("no JSON object")
    return content


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _floats(values: Any, what: str) -> array[float]:
    """A list of numbers. Words stand for the numbers that JSON lacks."""
    if not isinstance(values, list):
        raise FormatError(f"no list of {what}")
    try:
        return array("d", values)
    except (TypeError, OverflowError):
        pass
    try:
        return array("d", [v if isinstance(v, int | float) else NONFINITE[v] for v in values])
    except (KeyError, TypeError, OverflowError):
        raise FormatError(f"what is no number in {what}") from None


def _csv_line(cells: list[str]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(cells)
    return text.getvalue()


def _parse_csv(line: str) -> list[str]:
    try:
        return next(csv.reader([line], strict=True), [])
    except csv.Error:
        raise FormatError("not CSV") from None
