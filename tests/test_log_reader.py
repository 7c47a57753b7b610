"""A damaged log is read up to the damage, without an exception, and says where the damage is."""

from __future__ import annotations

import contextlib
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from log_rows import make_rows, rows_of

from fusedopt import NotALogError, Telemetry, read_log
from fusedopt.monitoring.log_format import BY_SUFFIX, Header
from fusedopt.monitoring.log_reader import LogReader
from fusedopt.monitoring.log_rows import join
from fusedopt.monitoring.log_writer import LogWriter
from fusedopt.monitoring.telemetry_rows import select
from fusedopt.telemetry import PARAM_COLUMNS

ROWS = 6
NAMES = {"a.weight": 6, "a.bias": 2}


def telemetry(steps: int = ROWS, first: int = 1, names: dict[str, int] = NAMES) -> Telemetry:
    """Random rows with everything that a log has to tell: nan, inf, a skip."""
    generator = torch.Generator().manual_seed(first)
    readings = torch.rand(steps, 3, generator=generator, dtype=torch.float64)
    readings[:, 2] = 0
    params = torch.rand(steps, 6, len(names), generator=generator, dtype=torch.float64)
    params[:, 2:4] = 0
    if steps > 2:
        readings[1] = torch.tensor([torch.inf, 0.0, 1.0])
        params[1, 0, 0], params[1, 2, 0], params[1, 5] = torch.inf, 123_456_789_012, torch.nan
        params[2, :, -1] = torch.nan
    lr = torch.rand(steps, 1, generator=generator, dtype=torch.float64)
    step = torch.arange(first, first + steps)
    return make_rows(step, readings, lr, names, params).telemetry()


def write(path: Path, *batches: Telemetry) -> Path:
    writer = LogWriter(path, Header.of(batches[0], "FusedSGD"))
    for rows in batches:
        writer.write(rows, torch.ones(len(rows.step), dtype=torch.bool))
    writer.close()
    return path


@pytest.fixture(params=list(BY_SUFFIX))
def path(request, tmp_path) -> Path:
    return tmp_path / f"run{request.param}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """One for all examples of hypothesis."""
    return tmp_path_factory.mktemp("logs")


CONTENTS: dict[str, bytes] = {}


def content(suffix: str, folder: Path) -> bytes:
    if suffix not in CONTENTS:
        CONTENTS[suffix] = write(folder / f"whole{suffix}", telemetry()).read_bytes()
    return CONTENTS[suffix]


def steps_of(path: Path) -> list[int]:
    return read_log(path).telemetry.step.tolist()


# What was written comes back


def test_all_columns_come_back(path):
    rows = telemetry()
    log = read_log(write(path, rows))
    assert log.damage is None
    assert log.optimizer == ("FusedSGD" if path.suffix == ".jsonl" else None)
    for name, column in rows.columns().items():
        torch.testing.assert_close(
            log.telemetry.columns()[name], column, rtol=1e-6, atol=0, equal_nan=True, msg=name
        )
    assert log.telemetry.params["a.weight"].infs[1] == 123_456_789_012
    sizes = [param.numel for param in log.telemetry.params.values()]
    assert sizes == ([6, 2] if path.suffix == ".jsonl" else [0, 0])


def test_a_log_in_many_batches(path):
    """More rows than a batch of the reader has."""
    names = {f"layer.{i}": i for i in range(300)}
    write(path, telemetry(900, names=names), telemetry(900, first=901, names=names))
    reader = LogReader(path)
    batches = list(reader.batches())
    assert len(batches) >= 4
    assert max(len(batch.step) for batch in batches) * 300 * 6 <= 1.01 * 2**20
    whole = join(batches).telemetry()
    assert whole.step.tolist() == list(range(1, 1801))
    expected = telemetry(900, first=901, names=names).params["layer.7"].grad_norm
    torch.testing.assert_close(
        whole.params["layer.7"].grad_norm[900:], expected, rtol=1e-6, atol=0, equal_nan=True
    )


def test_windows_line_ends(path):
    write(path, telemetry())
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    log = read_log(path)
    assert log.damage is None and len(log.telemetry.step) == ROWS


# Damage


@pytest.mark.parametrize("suffix", BY_SUFFIX)
def test_a_log_cut_at_every_byte(suffix, folder):
    whole = content(suffix, folder)
    path = folder / f"cut{suffix}"
    header = whole.index(b"\n") + 1
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        if length < header:
            with pytest.raises(NotALogError):
                read_log(path)
            continue
        log = read_log(path)
        lines = whole[:length].count(b"\n")
        assert log.telemetry.step.tolist() == list(range(1, lines))
        if whole[:length].endswith(b"\n"):
            assert log.damage is None
        else:
            expected = f"{path}, line {lines + 1}: cut off in the middle; this line is left out, "
            assert log.damage == expected + f"the {lines - 1} steps before it were read"


@settings(max_examples=150, deadline=None)
@given(
    suffix=st.sampled_from(list(BY_SUFFIX)),
    line=st.integers(1, ROWS),
    garbage=st.one_of(
        st.binary(min_size=1, max_size=40).filter(lambda data: b"\n" not in data),
        st.text('[]{}",:0123456789einfatrusl. ', min_size=1, max_size=60).map(str.encode),
        st.sampled_from([b"[" * 100_000, b"9" * 10_000, b"1e400", b"\0", b"\r", b'"']),
    ),
)
@example(suffix=".jsonl", line=2, garbage=b"[" * 100_000)
@example(suffix=".csv", line=2, garbage=b'"')
@example(suffix=".csv", line=2, garbage=b"1" * 200_000)
def test_a_line_of_garbage(suffix, line, garbage, folder):
    lines = content(suffix, folder).splitlines(keepends=True)
    path = folder / f"garbage{suffix}"
    path.write_bytes(b"".join([*lines[:line], garbage, b"\n", *lines[line:]]))
    log = read_log(path)
    assert log.telemetry.step.tolist() == list(range(1, line))
    after = ROWS - line + 1
    where = f"{path}, line {line + 1}: "
    assert log.damage is not None and log.damage.startswith(where)
    assert f"this line and the {after} after it are left out" in log.damage
    assert "\n" not in log.damage


@settings(max_examples=300, deadline=None)
@given(
    suffix=st.sampled_from(list(BY_SUFFIX)),
    position=st.floats(0, 1),
    removed=st.integers(0, 30),
    inserted=st.binary(max_size=30),
)
def test_any_change_of_bytes(suffix, position, removed, inserted, folder):
    """Only a bad first line raises; rows before the changed bytes are kept."""
    whole = content(suffix, folder)
    start = int(position * len(whole))
    path = folder / f"changed{suffix}"
    path.write_bytes(whole[:start] + inserted + whole[start + removed :])
    before = whole[:start].count(b"\n")  # so many lines are as they were
    reader = LogReader(path)
    steps: list[int] = []
    if before == 0:
        with contextlib.suppress(NotALogError):
            list(reader.batches())
        return
    for rows in reader.batches():
        steps += rows.step.tolist()
    assert steps[: before - 1] == list(range(1, before))
    if reader.damage is None:
        assert len(steps) >= before - 1
    else:
        found = re.search(r", line (\d+): ", reader.damage)
        assert found is not None and int(found[1]) == len(steps) + 2 > before
    log = read_log(path)  # in which a number that was changed may hide rows before it
    assert log.damage == reader.damage and len(log.telemetry.step) <= len(steps)


BAD_ROWS: list[tuple[Any, Any, str]] = [
    ("step", None, "no number of a step"),
    ("step", -1, "no number of a step"),
    ("step", 2.5, "no number of a step"),
    ("step", True, "no number of a step"),
    ("step", 2**63, "no number of a step"),
    ("skipped", 0, "no word on whether"),
    ("grad_norm", "big", "no number in its readings"),
    ("grad_norm", [1.0], "no number in its readings"),
    ("grad_norm", math.nan, "not JSON"),
    ("lr", 0.1, "no list of lr"),
    ("lr", [{}], "no number in lr"),
    ("lr", [10**400], "no number in lr"),
    ("params", [], "params is no object"),
    ("params", {}, "no list of grad_norm"),
    ("params", {key: [1.0] for key in PARAM_COLUMNS}, "1 values of grad_norm for 2 parameters"),
]


@pytest.mark.parametrize(("key", "value", "words"), BAD_ROWS)
def test_a_row_that_lacks_something(tmp_path, key, value, words):
    path = write(tmp_path / "run.jsonl", telemetry())
    lines = path.read_text().splitlines()
    lines[4] = json.dumps({**json.loads(lines[4]), key: value})
    path.write_text("\n".join(lines) + "\n")
    log = read_log(path)
    assert log.telemetry.step.tolist() == [1, 2, 3]
    assert log.damage is not None and f"{path}, line 5: " in log.damage and words in log.damage


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"fusedopt_log": 2}, "version 2 of the format; expected 1"),
        ({"params": "ab", "numel": "cd"}, "without its parameters"),
        ({"numel": [1]}, "without its parameters"),
        ({"params": ["a", "a"]}, "no names of their own"),
        ({"numel": [1, -1]}, "no sizes"),
    ],
)
def test_a_header_that_lacks_something(tmp_path, header, words):
    path = write(tmp_path / "run.jsonl", telemetry())
    first, *rest = path.read_text().splitlines(keepends=True)
    changed = json.dumps({**json.loads(first), **header}, separators=(",", ":"))
    path.write_text("".join([changed, "\n", *rest]))
    with pytest.raises(NotALogError, match=words):
        read_log(path)
    path.write_text("".join([first, *rest, changed, "\n"]))
    log = read_log(path)
    assert len(log.telemetry.step) == ROWS and words in str(log.damage)


@pytest.mark.parametrize("content", [b"", b"a,b\n1,2\n", b"\n", b"\0" * 5000, b"step,loss\n1,2\n"])
def test_what_is_no_log(tmp_path, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(NotALogError) as caught:
        read_log(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_a_line_without_end_is_not_read_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("fusedopt.monitoring.log_reader.LONGEST_LINE", 10_000)
    path = write(tmp_path / "run.jsonl", telemetry())
    with open(path, "ab") as file:
        file.write(b"x" * 50_000)
    words = "line 8: longer than 10,000 bytes; this line is left out"
    assert words in str(read_log(path).damage)
    assert words in str(_read_growing(LogReader(path)).damage)


def _read_growing(reader: LogReader) -> LogReader:
    list(reader.batches(growing=True))
    return reader


# Rows that replace others


def test_rows_of_a_resumed_run_replace_those_of_the_first(path):
    first, second, third = telemetry(6), telemetry(4, first=4), telemetry(2, first=9)
    rows = read_log(write(path, first, second, third)).telemetry
    assert rows.step.tolist() == [1, 2, 3, 4, 5, 6, 7, 9, 10]
    torch.testing.assert_close(rows.lr[3:7], second.lr, rtol=1e-6, atol=0)
    torch.testing.assert_close(rows.lr[:3], first.lr[:3], rtol=1e-6, atol=0)


def test_join_and_select_agree_with_the_parts():
    rows = telemetry(6)
    parts = [
        select(rows, slice(0, 2)),
        select(rows, torch.tensor([2, 3, 4])),
        select(rows, slice(5, 6)),
    ]
    joined = join([rows_of(part) for part in parts]).telemetry()
    for name, column in joined.columns().items():
        torch.testing.assert_close(column, rows.columns()[name], rtol=0, atol=0, equal_nan=True)
    assert len(join([]).step) == 0


# As it grows


def test_a_growing_log_is_read_once_and_half_a_line_waits(path, tmp_path):
    data = write(tmp_path / f"whole{path.suffix}", telemetry()).read_bytes()
    path.write_bytes(b"")
    reader = LogReader(path)
    seen: list[int] = []
    for position in range(0, len(data), 37):
        with open(path, "ab") as file:
            file.write(data[position : position + 37])
        assert not reader.was_replaced()
        for rows in reader.batches(growing=True):
            seen += rows.step.tolist()
    assert seen == list(range(1, ROWS + 1)) and reader.damage is None


@pytest.mark.parametrize("how", ["cut", "rewritten", "moved"])
def test_a_replaced_log_is_read_from_its_start(path, tmp_path, how):
    write(path, telemetry(6))
    reader = LogReader(path)
    assert not reader.was_replaced()
    assert [rows.step.tolist() for rows in reader.batches(growing=True)] == [[1, 2, 3, 4, 5, 6]]
    other = write(tmp_path / f"other{path.suffix}", telemetry(8, names={"b": 3}))
    if how == "cut":
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:3]))
    elif how == "rewritten":
        path.write_bytes(other.read_bytes())
    else:
        other.replace(path)
    assert reader.was_replaced()
    assert not reader.was_replaced()
    steps = [rows.step.tolist() for rows in reader.batches(growing=True)]
    assert steps == [list(range(1, 3 if how == "cut" else 9))]
