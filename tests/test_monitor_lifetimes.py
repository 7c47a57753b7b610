"""When a Monitor ends: taken over, copied, forked, and at Python's exit beside other threads."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from monitored import FORMATS, make, step
from torch import nn

import fusedopt
from fusedopt import Monitor, read_log


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


# A second Monitor, as when a notebook's cell is run again


@pytest.mark.parametrize("name", FORMATS)
def test_a_monitor_of_the_same_optimizer_takes_over(tmp_path, name):
    opt = make()
    monitor = Monitor(opt, tmp_path / name)
    step(opt)
    first, monitor = monitor, Monitor(opt, str(tmp_path / name))
    step(opt)
    first.close()
    step(opt)
    monitor.close()
    assert read_log(tmp_path / name).telemetry.step.tolist() == [1, 2, 3]
    assert not opt._optimizer_step_post_hooks and not opt._optimizer_step_pre_hooks


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("first_step", "steps"), [(None, [501, 502, 503]), (502, [501, 502])])
def test_numbering_goes_on_or_is_chosen_anew(tmp_path, name, first_step, steps):
    opt = make()
    Monitor(opt, tmp_path / name, first_step=501)
    step(opt)
    step(opt)
    with Monitor(opt, tmp_path / name, first_step=first_step):
        step(opt)
    assert read_log(tmp_path / name).telemetry.step.tolist() == steps


def test_a_logger_gets_no_step_twice():
    rows: list[dict[str, float]] = []
    opt, other = make(), make()
    for which in (opt, opt, other):
        Monitor(which, rows.append)
    for which in (opt, other):
        step(which)
    with Monitor(opt, rows.append), Monitor(other, rows.append):
        pass
    assert len(rows) == 2


def test_an_argument_that_is_refused_leaves_the_first_monitor_as_it_is(tmp_path):
    opt = make(telemetry=8)
    with Monitor(opt, tmp_path / "run.jsonl"):
        with pytest.raises(ValueError, match="every is 9"):
            Monitor(opt, tmp_path / "run.jsonl", every=9)
        step(opt)
    assert read_log(tmp_path / "run.jsonl").telemetry.step.tolist() == [1]


def test_a_monitor_of_another_optimizer_is_refused_and_says_what_to_do(tmp_path):
    opt = make()
    path = tmp_path / "run.jsonl"
    with Monitor(opt, path):
        words = r"run\.jsonl is being written .* for another optimizer \(a FusedSGD\): call .*close"
        with pytest.raises(FileExistsError, match=words):
            Monitor(make(), path)
        step(opt)
    assert read_log(path).telemetry.step.tolist() == [1]


def test_a_monitor_that_was_dropped_with_its_optimizer_is_in_nobodys_way(tmp_path):
    opt = make()
    Monitor(opt, tmp_path / "run.jsonl")
    step(opt)
    gc.disable()
    try:
        opt = make()
        with Monitor(opt, tmp_path / "run.jsonl", first_step=2):
            step(opt)
    finally:
        gc.enable()
    assert read_log(tmp_path / "run.jsonl").telemetry.step.tolist() == [1, 2]


def test_a_log_that_was_removed_is_begun_anew(tmp_path):
    opt = make()
    Monitor(opt, tmp_path / "run.jsonl")
    step(opt)
    (tmp_path / "run.jsonl").unlink()
    with Monitor(opt, tmp_path / "run.jsonl"):
        step(opt)
    assert read_log(tmp_path / "run.jsonl").telemetry.step.tolist() == [2]


# Copies


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda it: pickle.loads(pickle.dumps(it)),
}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_a_monitor_is_closed(tmp_path, how):
    opt = make()
    with Monitor(opt, tmp_path / "run.jsonl") as monitor:
        other = COPIES[how](monitor)
        with other:
            step(opt)
            other.flush()
        del other
        step(opt)
    assert read_log(tmp_path / "run.jsonl").telemetry.step.tolist() == [1, 2]


def test_a_module_with_a_monitor_can_be_copied_and_saved(tmp_path):
    net: Any = nn.Linear(3, 2)
    opt = fusedopt.FusedSGD(net.named_parameters(), telemetry=8, backend="reference")
    net.monitor = Monitor(opt, tmp_path / "run.jsonl")
    assert list(net.state_dict()) == ["weight", "bias"]
    step(opt)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    for other in (copy.deepcopy(net), torch.load(file, weights_only=False)):
        assert torch.equal(other.weight, net.weight)
        other.monitor.flush()
        other.monitor.close()
    step(opt)
    net.monitor.close()
    assert read_log(tmp_path / "run.jsonl").telemetry.step.tolist() == [1, 2]


# Threads


def test_a_step_and_a_flush_at_the_same_time_write_each_row_once(tmp_path):
    opt = make(telemetry=16)
    done = threading.Event()
    with Monitor(opt, tmp_path / "run.jsonl", every=2) as monitor:

        def flush() -> None:
            while not done.is_set():
                monitor.flush()

        threads = [threading.Thread(target=flush) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(300):
            step(opt)
        done.set()
        for thread in threads:
            thread.join()
    lines = (tmp_path / "run.jsonl").read_text().splitlines()
    assert len(lines) == 301
    assert read_log(tmp_path / "run.jsonl").telemetry.step.tolist() == list(range(1, 301))


# The end of a process. The name of the log, or of a file of logs, is the first argument.


MADE = """
import os, sys, threading, time, warnings
import torch, fusedopt
from fusedopt.monitoring import monitor as monitors
torch.set_num_threads(1)

def make(path):
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    opt = fusedopt.FusedSGD([("weight", param)], lr=1e-3, telemetry=16, backend="reference")
    return opt, fusedopt.Monitor(opt, path, every=5)
"""
DAEMON = """
opt, monitor = make(sys.argv[1])
stepped = threading.Event()

def work():
    while True:
        opt.step()
        stepped.set()

threading.Thread(target=work, daemon=True).start()
stepped.wait()
time.sleep(0.1)
"""
STUCK = """
monitors.EXIT_SECONDS = 0.2
inside = threading.Event()

def log(row):
    inside.set()
    time.sleep(1000)

opt, monitor = make(log)
other, second = make(sys.argv[1])
other.step()

def work():
    while True:
        opt.step()

threading.Thread(target=work, daemon=True).start()
inside.wait()
"""
BROKEN = """
def log(row):
    raise ValueError("no network")

opt, monitor = make(log)
other, second = make(sys.argv[1])
third, fourth = make(log)
for it in (opt, other, third):
    it.step()
"""
FORKED = """
import multiprocessing

def work():
    opt, monitor = make(sys.argv[1])
    for _ in range(7):
        opt.step()

child = multiprocessing.get_context("fork").Process(target=work)
child.start()
child.join(60)
sys.exit(child.exitcode)
"""


def test_exit_while_a_daemon_thread_steps(tmp_path):
    """torch itself may abort then, in a daemon thread of its own: the log is whole all the same."""
    run(MADE + DAEMON, tmp_path / "run.jsonl")
    log = read_log(tmp_path / "run.jsonl")
    count = len(log.telemetry.step)
    assert count > 1 and log.damage is None
    assert log.telemetry.step.tolist() == list(range(1, count + 1))
    assert (tmp_path / "run.jsonl").read_text().count("\n") == count + 1


def test_exit_does_not_wait_for_a_logger_that_hangs(tmp_path):
    done = run(MADE + STUCK, tmp_path / "run.jsonl")
    assert done.returncode == 0, done.stderr
    assert "a thread has been in a Monitor for 0.2 seconds" in done.stderr
    assert read_log(tmp_path / "run.jsonl").telemetry.step.tolist() == [1]


def test_a_logger_that_raises_at_exit_does_not_keep_others_from_their_rows(tmp_path):
    done = run(MADE + BROKEN, tmp_path / "run.jsonl")
    assert done.returncode == 0 and done.stderr.count("ValueError: no network") == 2
    assert read_log(tmp_path / "run.jsonl").telemetry.step.tolist() == [1]


def test_a_child_that_multiprocessing_forked_writes_its_last_rows(tmp_path: Path):
    done = run(MADE + FORKED, tmp_path / "run.jsonl")
    assert done.returncode == 0, done.stderr
    assert read_log(tmp_path / "run.jsonl").telemetry.step.tolist() == list(range(1, 8))
