"""`watch` shows a run in the terminal, and follows its log as it grows or is replaced."""

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

import pytest
import torch
from runs import HUGE, NAMES, SKIPPED, run_of
from test_log_reader import write

from fusedopt.__main__ import main
from fusedopt.monitoring.telemetry_rows import select

watch = pytest.importorskip("fusedopt.monitoring.watch")
pytest.importorskip("rich")


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
