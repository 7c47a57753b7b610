"""`plot` and `watch` show runs of any length, and say what is wrong with other files."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import math
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from log_rows import make_rows, rows_of
from test_log_reader import write

from fusedopt import Telemetry
from fusedopt.__main__ import main
from fusedopt.monitoring.history import History
from fusedopt.monitoring.layers import gather
from fusedopt.monitoring.telemetry_rows import select

plot = pytest.importorskip("fusedopt.monitoring.plot")
watch = pytest.importorskip("fusedopt.monitoring.watch")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

SKIPPED, HUGE, FIRST_WITH_BIAS = 30, 45, 11
NAMES = ["rnn.weight", "rnn.bias", "out.weight"]


def run_of(steps: int, names: list[str] = NAMES, groups: int = 1) -> Telemetry:
    """Norms around 1. Step 30 is skipped for an inf in the first parameter, step 45 is huge."""
    generator = torch.Generator().manual_seed(0)
    step = torch.arange(1, steps + 1)
    params = torch.zeros(steps, 6, len(names), dtype=torch.float64)
    params[:, 0] = torch.rand(steps, len(names), generator=generator) + 0.5
    params[:, 4], params[:, 5] = 0.02, 2.0
    norm = params[:, 0].square().sum(1).sqrt()
    norm[step == HUGE] = 1e6
    params[step == HUGE, 0, -1] = 1e6
    coef = (4.0 / norm).clamp(max=1.0)
    skipped = step == SKIPPED
    norm[skipped], coef[skipped] = math.inf, 0.0
    params[skipped, 0, 0], params[skipped, 2, 0] = math.inf, 3
    params[skipped, 4], params[skipped, 5] = 0.0, math.nan
    if len(names) > 1:
        params[: FIRST_WITH_BIAS - 1, :, 1] = math.nan
    lr = (0.1 / step)[:, None].double().expand(-1, groups)
    readings = torch.stack([norm, coef, skipped.double()], 1)
    return make_rows(step, readings, lr, dict.fromkeys(names, 10), params).telemetry()


def history_of(rows: Telemetry, batch: int = 1000, intervals: int = 64) -> History:
    history = History(intervals)
    for start in range(0, len(rows.step), batch):
        history.add(rows_of(select(rows, slice(start, start + batch))))
    return history


# A history


@pytest.mark.parametrize(
    ("steps", "batch"), [(1, 1), (10, 3), (64, 7), (65, 1), (100, 1), (100, 40), (5000, 1000)]
)
def test_a_history_of_any_length_keeps_what_stood_out(steps, batch):
    rows = run_of(steps)
    history = history_of(rows, batch)
    assert len(history) <= 64 and history.width * len(history) >= steps
    assert history.width == 2 ** max(0, math.ceil(math.log2(steps / 64)))
    assert history["steps"].sum() == steps
    assert history["skipped"].sum() == rows.skipped.sum()
    assert history["clipped"].sum() == ((rows.clip_coef < 1) & ~rows.skipped).sum()
    starts = history.starts()
    for i, start in enumerate(starts.tolist()):
        inside = (rows.step >= start) & (rows.step < start + history.width) & ~rows.skipped
        if inside.any():
            assert history["norm_max"][i] == rows.grad_norm[inside].max()
            assert history["norm_min"][i] == rows.grad_norm[inside].min()
            assert history["coef_min"][i] == rows.clip_coef[inside].min()
            assert history["lr"][i] == rows.lr[rows.step >= start][0]
    where = (SKIPPED - 1) // history.width
    if steps >= SKIPPED:
        assert history["param_bad"][where].tolist() == [1, 0, 0]
    assert history["param_bad"].nan_to_num(0).sum() == (steps >= SKIPPED)
    if history.width == 1 and steps >= SKIPPED:
        assert history["norm_max"][where].isnan()
    bias = history["param_max"][:, 1].isnan().nonzero().flatten()
    assert (bias * history.width < FIRST_WITH_BIAS).all()


def test_a_history_of_a_resumed_run_forgets_what_is_replaced():
    rows = run_of(40)
    history = history_of(rows)
    assert history["skipped"].sum() == 1
    again = select(run_of(26), slice(20, None))
    history.add(rows_of(again))
    assert history["steps"].tolist() == [1] * 26 and history["skipped"].sum() == 0
    history.add(rows_of(select(rows, slice(26, None))))
    assert history["steps"].tolist() == [1] * 40 and history["skipped"].sum() == 1


def test_a_history_in_which_parameters_and_groups_come_and_go():
    history = history_of(run_of(5, ["a", "b"]))
    rows = run_of(10, ["b", "c"], groups=2)
    history.add(rows_of(select(rows, slice(5, None))))
    history.add(rows_of(select(run_of(12, ["a"]), slice(10, None))))
    assert history.names == ["a", "b", "c"]
    known = ~history["param_max"].isnan()
    assert known[:, 0].tolist() == [True] * 5 + [False] * 5 + [True] * 2
    assert known[:, 2].tolist() == [False] * 12  # in its first steps it has no gradient
    assert history["param_max"][7, 1] == rows.params["b"].grad_norm[7]
    assert history["lr"][:, 1].isnan().tolist() == [True] * 5 + [False] * 5 + [True] * 2


# Rows of a heat map


def test_parameters_are_gathered_by_module():
    names = [f"h.{i}.{part}.{kind}" for i in range(3) for part in "ab" for kind in "wx"]
    assert gather(names, 12) == [(name, [i]) for i, name in enumerate(names)]
    by_part = gather(names, 11)
    assert [label for label, _ in by_part] == [f"h.{i}.{part}" for i in range(3) for part in "ab"]
    assert by_part[1] == ("h.0.b", [2, 3])
    assert gather(names, 5) == [(f"h.{i}", list(range(4 * i, 4 * i + 4))) for i in range(3)]
    assert gather(names, 1) == [("h", list(range(12)))]
    assert gather([], 5) == []


def test_parameters_without_modules_are_gathered_by_neighborhood():
    rows = gather([str(i) for i in range(100)], 40)
    assert rows[0] == ("0 and 2 more", [0, 1, 2]) and rows[-1] == ("99 and 0 more", [99])
    assert [index for _, members in rows for index in members] == list(range(100))


# A picture


def marks(axes: Any) -> dict[str, list[float]]:
    """Where the scattered marks of each kind are."""
    return {
        str(collection.get_label()): [float(x) for x in collection.get_offsets()[:, 0]]
        for collection in axes.collections
        if hasattr(collection, "get_offsets") and len(collection.get_offsets())
    }


def test_a_picture_marks_what_happened():
    figure = plot.draw(history_of(run_of(60)), "my run", "FusedSGD")
    norm, coef, lr, layers, *_ = figure.axes
    found = marks(norm)
    assert found["skipped"] == [SKIPPED] and found["clipped"] == [HUGE]
    assert norm.get_yscale() == "log" and coef.get_yscale() == "log"
    line = norm.lines[0].get_ydata()
    assert line[HUGE - 1] == 1e6 and math.isnan(line[SKIPPED - 1])
    assert "FusedSGD, 60 steps, 1 clipped (1.7%), 1 skipped, 3 parameters" in figure._suptitle._text
    assert [label.get_text() for label in layers.get_yticklabels()] == NAMES
    heat = layers.images[0].get_array()
    assert heat.shape == (3, 60)
    assert heat.mask[1].tolist() == [True] * (FIRST_WITH_BIAS - 1) + [False] * 50
    assert heat[2, HUGE - 1] == 1e6
    assert marks(layers) == {"inf or nan": [SKIPPED]}
    assert layers.collections[0].get_offsets()[0, 1] == 0
    assert lr.lines[0].get_ydata()[1] == pytest.approx(0.05)


def test_a_long_run_of_many_parameters_is_drawn_in_bounded_size():
    names = [f"h.{i}.{part}" for i in range(100) for part in ("w", "b", "c", "d", "e")]
    figure = plot.draw(history_of(run_of(3000, names), intervals=1024), "long")
    norm, *_, layers, _ = figure.axes
    assert len(norm.lines[0].get_xdata()) == 750
    assert len(layers.get_yticklabels()) <= plot.MOST_ROWS
    assert layers.get_xlabel() == "step (4 to a point)"
    assert len(marks(norm)["skipped"]) == 1
    assert max(norm.lines[0].get_ydata()) == 1e6
    assert float(layers.images[0].get_array().max()) == 1e6
    assert figure.get_size_inches().prod() < 12 * 18


@pytest.mark.parametrize("kind", ["all clipped", "all skipped", "zeros", "nan", "not logged"])
def test_odd_runs_are_drawn(tmp_path, kind):
    steps = 40
    readings = torch.tensor([[2.0, 0.5, 0.0]], dtype=torch.float64).repeat(steps, 1)
    params = torch.ones(steps, 6, 2, dtype=torch.float64)
    params[:, 2:4] = 0
    if kind == "all skipped":
        readings[:] = torch.tensor([math.inf, 0.0, 1.0])
        params[:, 0], params[:, 2] = math.inf, 1.0
    elif kind == "zeros":
        readings[:, 0], params[:, 0] = 0.0, 0.0
    elif kind == "nan":
        readings[:, :2], params[:, 0], params[:, 3] = math.nan, math.nan, 1.0
    elif kind == "not logged":
        params[torch.arange(1, steps + 1) % 10 != 0] = math.nan
    lr = torch.full((steps, 1), 0.1, dtype=torch.float64)
    step = torch.arange(1, steps + 1)
    rows = make_rows(step, readings, lr, {"a": 1, "b": 2}, params).telemetry()
    figure = plot.draw(history_of(rows), kind)
    norm, *_ = figure.axes
    figure.savefig(tmp_path / "out.png")
    texts = [text.get_text() for text in norm.get_legend().get_texts()]
    assert ("clipped" in texts) == (kind in ("all clipped", "zeros", "not logged"))
    assert ("skipped" in texts) == (kind == "all skipped")
    assert ("inf or nan, not skipped" in texts) == (kind == "nan")
    if kind == "not logged":  # the last that was logged is shown until the next
        heat = figure.axes[3].images[0].get_array()
        assert heat.mask[0].tolist() == [True] * 9 + [False] * 31


def test_plot_writes_a_png(tmp_path, capsys):
    log = write(tmp_path / "run.jsonl", run_of(50))
    assert main(["plot", str(log)]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'run.png'}\n"
    data = (tmp_path / "run.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", data[16:24])
    assert width == 1440 and 700 < height < 2400
    assert main(["plot", str(log), "-o", str(tmp_path / "other.svg")]) == 0
    assert (tmp_path / "other.svg").stat().st_size > 1000


def test_a_damaged_log_is_drawn_with_a_word(tmp_path, capsys):
    log = write(tmp_path / "run.csv", run_of(50))
    log.write_bytes(log.read_bytes()[:-10])
    assert main(["plot", str(log)]) == 0
    printed = capsys.readouterr()
    assert f"{log}, line 51: cut off in the middle" in printed.err
    assert len(printed.err.splitlines()) == 1
    assert (tmp_path / "run.png").exists()


@pytest.mark.parametrize("command", [["plot"], ["watch", "--once"]])
@pytest.mark.parametrize("kind", ["text", "missing", "folder", "empty", "header only"])
def test_what_is_no_log_is_one_line_and_status_2(tmp_path, capsys, command, kind):
    path = tmp_path / "file.jsonl"
    if kind == "text":
        path.write_text("hello\n")
    elif kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.write_text("")
    elif kind == "header only":
        whole = write(tmp_path / "whole.jsonl", run_of(2))
        path.write_text(whole.read_text().splitlines()[0] + "\n")
    status = main([*command, str(path)])
    printed = capsys.readouterr()
    if command[0] == "watch" and kind in ("empty", "header only"):  # it may yet become one
        assert status == 0 and "no steps yet" in printed.out
        return
    assert status == 2
    assert printed.out == "" and len(printed.err.splitlines()) == 1 and str(path) in printed.err
    assert not path.with_suffix(".png").exists()


@pytest.mark.parametrize(("output", "words"), [("no/out.png", "No such file"), ("x.abc", "abc")])
def test_a_picture_that_can_not_be_written(tmp_path, capsys, output, words):
    log = write(tmp_path / "run.jsonl", run_of(5))
    assert main(["plot", str(log), "-o", str(tmp_path / output)]) == 2
    error = capsys.readouterr().err
    assert words in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(("command", "package"), [("plot", "matplotlib"), ("watch", "rich")])
def test_a_missing_package_is_one_line(tmp_path, capsys, monkeypatch, command, package):
    log = write(tmp_path / "run.jsonl", run_of(5))
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert main([command, str(log)]) == 2
    error = f"python -m fusedopt: {command} needs {package}: pip install {package}\n"
    assert capsys.readouterr().err == error


# The terminal


def test_watch_once_says_what_matters(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.chdir(tmp_path)  # a name that fits in a line
    assert main(["watch", "--once", str(write(Path("run.jsonl"), run_of(HUGE)))]) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "FusedSGD  3 parameters" in printed
    lines = [line.split() for line in printed.splitlines()]
    assert ["step", "45"] in lines
    assert "1 of 45 recent steps" in printed
    assert "step 30: inf or nan in rnn.weight" in printed
    table = [line for line in lines if line and line[0] in NAMES]
    assert [line[0] for line in table] == ["rnn.weight", "out.weight", "rnn.bias"]
    assert table[0][-2:] == ["1", "step"]  # held inf or nan
    assert table[1][1] == "1e+06" and float(table[1][3].rstrip("x")) > 1e5  # has grown
    assert table[2][4] == "0.01"  # the ratio of its update
    spark = next(line for line in printed.splitlines() if line.startswith("  recent"))
    assert spark.count("!") == 1 and spark.rstrip().endswith("█")


def test_watch_prints_once_where_nobody_watches(tmp_path):
    log = write(tmp_path / "run.csv", run_of(5))
    command = [sys.executable, "-m", "fusedopt", "watch", str(log)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "\x1b" not in done.stdout and "gradient norm" in done.stdout


def test_watch_names_damage_and_takes_names_as_they_are(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    log = write(tmp_path / "run.jsonl", run_of(40, ["a[red].w", "b"]))
    with open(log, "ab") as file:
        file.write(b"garbage\n")
    assert main(["watch", "--once", str(log)]) == 0
    printed = capsys.readouterr().out
    assert "line 42: not JSON" in printed
    assert [line.split()[0] for line in printed.splitlines() if " 1 step" in line] == ["a[red].w"]


@pytest.mark.parametrize("steps", [1, 3, 300, 5000])
def test_the_view_of_a_growing_and_replaced_log(tmp_path, steps):
    rows = run_of(steps)
    log = write(tmp_path / "run.jsonl", rows)
    view = watch.View(log)
    view.update()
    assert int(view._recent.step[-1]) == steps and len(view._recent.step) <= watch.WINDOW
    with open(log, "ab") as file:
        more = write(tmp_path / "more.jsonl", select(run_of(steps + 2), slice(-2, None)))
        file.write(more.read_bytes())
    view.update()
    assert int(view._recent.step[-1]) == steps + 2 == view._history.last
    write(tmp_path / "new.jsonl", run_of(2)).replace(log)
    view.update()
    assert view._recent.step.tolist() == [1, 2] and view._history.last == 2


def test_sparklines():
    assert watch.sparkline(torch.tensor([1.0, 10.0, 100.0]), 10) == "▁▅█"
    assert watch.sparkline(torch.tensor([1.0, math.nan, 100.0]), 10) == "▁!█"
    assert watch.sparkline(torch.tensor([1.0, 1.0, 5.0, 1.0, 1.0]), 3) == "▁█▁"
    assert watch.sparkline(torch.full((3,), math.nan), 10) == "!!!"
    assert watch.sparkline(torch.zeros(2), 10) == "▁▁"


def test_watch_follows_in_a_terminal_and_ends_with_ctrl_c(tmp_path):
    log = write(tmp_path / "run.jsonl", run_of(5))
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    command = [sys.executable, "-m", "fusedopt", "watch", str(log), "--interval", "0.1"]
    screen = bytearray()

    def read() -> None:
        with contextlib.suppress(OSError):  # the terminal is gone
            while True:
                screen.extend(os.read(ours, 2**16))

    def wait_for(text: str) -> None:
        end = time.monotonic() + 120
        while text.encode() not in screen:
            assert time.monotonic() < end, screen.decode(errors="replace")
            time.sleep(0.05)

    environment = {**os.environ, "TERM": "xterm-256color"}
    # What a shell runs in the background ignores Ctrl-C, and so would its children.
    listens = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    child = subprocess.Popen(
        command, stdout=theirs, stderr=theirs, env=environment, preexec_fn=listens
    )
    try:
        os.close(theirs)
        reader = threading.Thread(target=read)
        reader.start()
        wait_for("step              5")
        write(tmp_path / "longer.jsonl", run_of(SKIPPED)).replace(log)
        wait_for(f"step {SKIPPED}: inf or nan in rnn.weight")
        child.send_signal(signal.SIGINT)
        assert child.wait(60) == 0
    finally:
        child.kill()
        child.wait()
    reader.join(60)
    os.close(ours)
    assert b"Traceback" not in screen and screen.rstrip().endswith(b"\x1b[?25h")  # the cursor


def test_plot_and_watch_are_not_imported_with_fusedopt():
    code = (
        "import sys, fusedopt; "
        "print([n for n in ('matplotlib', 'rich', 'tensorboard') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_help_names_the_subcommands(capsys):
    for command in ("plot", "watch"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert f"usage: python -m fusedopt {command}" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--help"])
    help_text = capsys.readouterr().out
    assert "plot LOG" in help_text and "watch LOG" in help_text
