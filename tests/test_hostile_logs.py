"""Any file is read, drawn and shown, or refused in one line, in seconds and in little memory."""

from __future__ import annotations

import contextlib
import io
import json
import math
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fusedopt import NotALogError, read_log
from fusedopt.__main__ import main
from fusedopt.monitoring.layers import gather
from fusedopt.monitoring.plot import draw, history_of
from fusedopt.monitoring.words import printable, short_name
from fusedopt.telemetry import PARAM_COLUMNS

pytest.importorskip("matplotlib")
pytest.importorskip("rich")


def header(names: list[str], optimizer: str = "FusedSGD") -> str:
    content = {
        "fusedopt_log": 1,
        "optimizer": optimizer,
        "params": names,
        "numel": [1] * len(names),
    }
    return json.dumps(content, separators=(",", ":"))


def row(step: int, params: int | None, value: Any = 1.0, lr: Any = (0.1,), **readings: Any) -> str:
    """A line for a step; `value` is that of all measurements of its parameters."""
    content = {"step": step, "grad_norm": 1.0, "clip_coef": 1.0, "skipped": False, **readings}
    content["lr"] = list(lr)
    if params is not None:
        content["params"] = {column: [value] * params for column in PARAM_COLUMNS}
    return json.dumps(content)


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def shown(*command: str) -> tuple[int, str, str]:
    """The exit status and the output."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(list(command))
    return status, out.getvalue(), err.getvalue()


def assert_plain(text: str) -> None:
    assert all(line.isprintable() for line in text.split("\n")), repr(text)


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch):
    monkeypatch.setattr("fusedopt.monitoring.plot.DPI", 30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """One for all examples of hypothesis."""
    return tmp_path_factory.mktemp("hostile")


# Names


HOSTILE_NAMES = [
    "\x1b]0;title\x07\x1b[31mred",
    "c1\x9b31m",
    "line\nbreak\r\t\0",
    "\ud800 lone",
    "right\u202eto\u2066left",
    "layer$x^{2$",
    r"$\frac$",
    "[red]x[/]",
    "n" * 10_000,
    "",
    "层.权重",
]


@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=range(len(HOSTILE_NAMES)))
def test_a_name_of_any_letters(tmp_path, name):
    bad = row(2, 2, "inf", grad_norm="inf", skipped=True)
    log = write(tmp_path / "run.jsonl", header([name, "other"], name), row(1, 2), bad)
    assert list(read_log(log).telemetry.params) == [name, "other"]
    status, out, err = shown("watch", "--once", str(log))
    assert (status, err) == (0, "")
    assert_plain(out)
    assert "inf or nan in " in out
    assert shown("plot", str(log)) == (0, f"wrote {tmp_path / 'run.png'}\n", "")


def test_words_are_made_printable():
    assert printable("layers.0.wéight 层") == "layers.0.wéight 层"
    assert printable("\x1b[1m\ud800\x9b\u202e\n") == r"\x1b[1m\ud800\x9b\u202e\n"
    assert short_name("a" * 60) == "a" * 60
    assert short_name("a" * 50 + "b" * 50, 21) == "aaaaaaa...bbbbbbbbbbb"
    assert (
        short_name("\x1b" * 10**6, 21)
        == r"\x1b\x1...\x1b\x1b\x1b"[:7] + "..." + r"\x1b\x1b\x1b"[-11:]
    )


@pytest.mark.parametrize("command", [["plot"], ["watch", "--once"]])
def test_a_path_of_any_letters(tmp_path, command):
    for text in ("\x1b[31m.jsonl", "\udcff.jsonl", "a\nb.jsonl"):
        path = tmp_path / text
        status, out, err = shown(*command, str(path))
        assert status == 2 and len(err.splitlines()) == 1 and out == ""
        assert_plain(err)
        write(path, header(["a"]), row(1, 1))
        status, out, err = shown(*command, str(path))
        assert (status, err) == (0, "")
        assert_plain(out)


def test_a_damaged_line_is_told_in_one_printable_line(tmp_path):
    version = '{"fusedopt_log":' + "[" * 900 + '"\\u001b"' + "]" * 900 + "}"
    log = write(tmp_path / "run.jsonl", header(["a"]), row(1, 1), version)
    damage = str(read_log(log).damage)
    assert "line 3: version [[" in damage and len(damage) < 500
    assert_plain(damage)


# Values


VALUES = [math.inf, -math.inf, None, 0.0, -1.0, 5e-324, 1.7e308, -1.7e308]


def as_json(value: float | None) -> Any:
    return value if value is None or math.isfinite(value) else f"{value}"


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("steps", [1, 3])
def test_values_of_any_size_are_drawn_and_shown(tmp_path, value, steps):
    value = as_json(value)
    readings = {"grad_norm": value, "clip_coef": value, "lr": [value, 0.1]}
    rows = [row(step, 1, value, **readings) for step in range(1, steps + 1)]
    log = write(tmp_path / "run.jsonl", header(["a"]), *rows)
    assert shown("plot", str(log))[0] == 0
    assert shown("watch", "--once", str(log))[0] == 0


@pytest.mark.parametrize("names", [[], ["a"]])
@pytest.mark.parametrize("lr", [[], [0.0], [1.0] * 200])
@pytest.mark.parametrize("last", [0, 1, 2**48 - 1])
def test_counts_of_any_size_are_drawn_and_shown(tmp_path, names, lr, last):
    rows = [row(step, len(names), lr=lr) for step in sorted({0, last})]
    log = write(tmp_path / "run.jsonl", header(names), *rows)
    assert shown("plot", str(log))[0] == 0
    assert shown("watch", "--once", str(log))[0] == 0


def test_an_infinite_learning_rate_is_a_gap_and_not_the_largest_number(tmp_path):
    log = write(tmp_path / "run.jsonl", header(["a"]), row(1, 1, lr=[0.5]), row(2, 1, lr=["inf"]))
    history, _ = history_of(log)
    assert history["lr"][:, 0].tolist() == [0.5, math.inf]
    figure = draw(history, "run")
    drawn = figure.axes[2].lines[0].get_ydata()
    assert drawn[0] == 0.5 and math.isnan(drawn[1])


# The fixture of small pictures is the same for all examples, which are slow to draw.
HEALTHY = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]

numbers = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False), st.sampled_from(["inf", "-inf", None, 0])
)


@st.composite
def logs(draw: Any) -> list[str]:
    """Lines of a well-formed log with headers, steps, names and numbers of any kind."""
    lines: list[str] = []
    for _ in range(draw(st.integers(1, 3))):
        names = draw(st.lists(st.text(max_size=8), max_size=4, unique=True))
        lines.append(header(names, draw(st.text(max_size=5))))
        for _ in range(draw(st.integers(0, 4))):
            readings = {"grad_norm": draw(numbers), "clip_coef": draw(numbers)}
            readings["skipped"] = draw(st.booleans())
            step = draw(st.one_of(st.integers(0, 9), st.integers(0, 2**48 - 1)))
            count = draw(st.sampled_from([None, len(names)]))
            lr = draw(st.lists(numbers, max_size=3))
            lines.append(row(step, count, draw(numbers), lr, **readings))
    return lines


@settings(max_examples=25, deadline=None, suppress_health_check=HEALTHY)
@given(lines=logs())
def test_a_log_of_any_numbers_is_read_shown_and_drawn(lines, folder):
    log = write(folder / "any.jsonl", *lines)
    steps = len(read_log(log).telemetry.step)
    status, out, err = shown("watch", "--once", str(log))
    assert (status, err) == (0, "")
    assert_plain(out)
    history, reader = history_of(log)
    assert reader.damage is None and (len(history) > 0) == (steps > 0)
    if steps:
        assert shown("plot", str(log))[0] == 0


@settings(max_examples=100, deadline=None, suppress_health_check=HEALTHY)
@given(
    start=st.sampled_from(["", header(["a"]) + "\n", '{"fusedopt_log":', "step,grad_norm,"]),
    rest=st.one_of(st.binary(max_size=200), st.text(max_size=100).map(str.encode)),
)
@example(start="", rest=b"")
def test_bytes_of_any_kind_are_read_or_refused(start, rest, folder):
    log = folder / "bytes.jsonl"
    log.write_bytes(start.encode() + rest)
    with contextlib.suppress(NotALogError):
        read_log(log)
    status, out, err = shown("watch", "--once", str(log))
    assert status in (0, 2) and len(err.splitlines()) == (status == 2)
    assert_plain(out + err)


# What it costs


def many_headers() -> Iterator[str]:
    """A parameter of another name in each step."""
    for i in range(1, 3001):
        yield header([f"p{i}"])
        yield row(i, 1)


def many_params() -> Iterator[str]:
    yield header([f"p{i}" for i in range(50_000)])
    for i in range(1, 3000):
        yield row(i, None)


def steps_there_and_back() -> Iterator[str]:
    yield header([f"p{i}" for i in range(3000)])
    for _ in range(2000):
        yield row(1000, None)
        yield row(2, None)


def leaps() -> Iterator[str]:
    for i in range(2000):
        yield header([f"p{i}"])
        yield row((1, 2**47, 2)[i % 3], 1)


def many_learning_rates() -> Iterator[str]:
    yield header(["a"])
    yield row(1, 1, lr=[0.1] * 100_000)
    for i in range(2, 3000):
        yield row(i, 1)


def group_counts_that_alternate() -> Iterator[str]:
    yield header(["a"])
    for i in range(1, 4000):
        yield row(i, 1, lr=[0.1] * (1 + i % 2))


COSTLY = [
    many_headers,
    many_params,
    steps_there_and_back,
    leaps,
    many_learning_rates,
    group_counts_that_alternate,
]
MEASURED = """
import resource, sys, time
import torch, fusedopt
from fusedopt.monitoring.plot import history_of
from fusedopt.monitoring.watch import View
from pathlib import Path
torch.set_num_threads(1)
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before, started = peak(), time.process_time()
for look in (fusedopt.read_log, history_of, lambda log: View(Path(log)).update()):
    try:
        look(sys.argv[1])
    except fusedopt.NotALogError as error:
        print(error, file=sys.stderr)
print((peak() - before) // 1024, time.process_time() - started)
"""


@pytest.mark.parametrize("lines", COSTLY, ids=lambda lines: lines.__name__)
def test_a_log_of_a_megabyte_takes_seconds_and_little_memory(tmp_path, lines):
    log = write(tmp_path / "run.jsonl", *lines())
    assert log.stat().st_size < 1.5e6
    command = [sys.executable, "-c", MEASURED, str(log)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    megabytes, seconds = map(float, done.stdout.split())
    refused = "a step with 100,000 learning rates makes a table of"
    assert (refused in done.stderr) == (lines is many_learning_rates)
    assert megabytes < 400 and seconds < 30, done.stdout


def test_columns_of_a_parameter_are_made_when_they_are_asked_for(tmp_path):
    log = write(tmp_path / "run.jsonl", *many_headers())
    tracemalloc.start()
    try:
        telemetry = read_log(log).telemetry
    finally:
        tracemalloc.stop()
    assert len(telemetry.params) == len(telemetry.step) == 3000
    norms = telemetry.params["p7"].grad_norm
    assert norms.isnan().sum() == 2999 and norms[6] == 1.0


def test_gathering_of_names_with_many_parts_is_quick():
    names = ["." * 100_000, *(f"layer.{i}.weight" for i in range(60))]
    started = time.process_time()
    assert [len(members) for _, members in gather(names, 48)] == [1, 60]
    assert time.process_time() - started < 10
