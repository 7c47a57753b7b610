"""A Monitor writes every step once, to any destination, and its output can be read."""

from __future__ import annotations

import copy
import csv
import gc
import json
import math
import signal
import subprocess
import sys
import time
import tracemalloc
from typing import Any

import pytest
import torch
from monitored import FORMATS, SCRIPT, Steps, assert_logged, assert_rows, make, step
from torch import Tensor, nn

import fusedopt
from fusedopt import Monitor, read_log
from fusedopt.telemetry import STEP_COLUMNS, PendingTelemetry

# What is written


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("every", [1, 3, 8, None])
def test_every_step_is_written_once(tmp_path, name, every):
    opt = make(telemetry=8)
    whole = make(telemetry=30)
    kinds = ["random"] * 5 + ["inf", "none", "nan", "random", "none"]
    with Monitor(opt, tmp_path / name, every=every):
        for which in (opt, whole):
            torch.manual_seed(1)
            for kind in (kinds * 3)[:29]:
                step(which, kind)
    log = read_log(tmp_path / name)
    assert log.damage is None
    assert log.telemetry.step.tolist() == list(range(1, 30))
    assert log.telemetry.skipped.sum() == 6
    assert_logged(log.telemetry, whole.telemetry())


def test_jsonl_is_strict_json_with_the_names_once(tmp_path):
    opt = make(cls=fusedopt.FusedAdamW)
    with Monitor(opt, tmp_path / "run.jsonl"):
        for kind in ("random", "inf", "nan", "none"):
            step(opt, kind)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = (tmp_path / "run.jsonl").read_text().splitlines()
    header, *rows = (json.loads(line, parse_constant=refuse) for line in lines)
    assert header["fusedopt_log"] == 1 and header["optimizer"] == "FusedAdamW"
    assert header["params"] == ["weight", "bias"] and header["numel"] == [6, 2]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["skipped"] for row in rows] == [False, True, True, False]
    assert rows[1]["grad_norm"] == "inf" and rows[2]["grad_norm"] is None
    assert rows[1]["params"]["infs"] == [1, 0] and rows[2]["params"]["nans"] == [1, 0]
    assert rows[3]["params"]["grad_norm"][0] is None and rows[3]["params"]["grad_norm"][1] > 0


def test_csv_has_the_columns_of_telemetry(tmp_path):
    opt = make()
    with Monitor(opt, tmp_path / "run.csv"):
        step(opt)
        step(opt, "inf")
    with open(tmp_path / "run.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = opt.telemetry().columns()
    assert list(rows[0]) == list(columns)
    assert [row["skipped"] for row in rows] == ["0", "1"]
    assert float(rows[1]["grad_norm/weight"]) == math.inf
    assert float(rows[0]["update_ratio/bias"]) == pytest.approx(columns["update_ratio/bias"][0])


@pytest.mark.parametrize("name", FORMATS)
def test_params_every_thins_the_parameters_but_not_what_went_wrong(tmp_path, name):
    opt = make()
    with Monitor(opt, tmp_path / name, params_every=4):
        for number in range(1, 13):
            step(opt, "inf" if number == 6 else "random")
    rows = read_log(tmp_path / name).telemetry
    assert rows.grad_norm.isnan().sum() == 0 and len(rows.step) == 12
    logged = rows.step[~rows.params["bias"].infs.isnan()]
    assert logged.tolist() == [4, 6, 8, 12]
    assert rows.params["weight"].infs[5] == 1


def test_a_function_gets_a_flat_dict_for_every_step():
    rows: list[dict[str, float]] = []
    opt = make()
    with Monitor(opt, rows.append, params_every=2):
        for kind in ("random", "random", "random"):
            step(opt, kind)
    telemetry = opt.telemetry()
    short = {"step", *STEP_COLUMNS, "lr/0"}
    assert [row.keys() == short for row in rows] == [True, False, True]
    assert all(type(value) in (int, float) for row in rows for value in row.values())
    for name, column in telemetry.columns().items():
        assert rows[1][name] == column[1].item(), name


def test_a_function_gets_parameters_rarely_unless_it_asks():
    rows: list[dict[str, float]] = []
    opt = make(cls=Steps)
    with Monitor(opt, rows.append):
        for _ in range(250):
            opt.step()
    assert [row["step"] for row in rows if "grad_norm/bias" in row] == [100, 200]
    assert [row["step"] for row in rows] == list(range(1, 251))


def test_tensorboard_has_every_step(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    opt = make()
    writer = tensorboard.SummaryWriter(tmp_path)
    with Monitor(opt, writer, params_every=1):
        for kind in ("random", "none", "inf"):
            step(opt, kind)
    writer.add_scalar("loss", 1.0, 4)  # it is still open
    writer.close()
    events = reader.EventAccumulator(str(tmp_path)).Reload()
    norms = events.Scalars("grad_norm")
    assert [event.step for event in norms] == [1, 2, 3]
    assert [event.value for event in norms] == opt.telemetry().grad_norm.float().tolist()
    assert [event.step for event in events.Scalars("grad_norm/weight")] == [1, 3]
    assert events.Scalars("skipped")[2].value == 1


def test_what_a_logger_raises_comes_out_of_the_step():
    def broken(row: dict[str, float]) -> None:
        raise ValueError("no network")

    opt = make(telemetry=1)
    monitor = Monitor(opt, broken)
    with pytest.raises(ValueError, match="no network"):
        step(opt)
    monitor.close()


# When


def test_rows_come_in_batches_and_flush_brings_all():
    rows: list[dict[str, float]] = []
    opt = make(telemetry=8)
    monitor = Monitor(opt, rows.append, every=5)
    seen = []
    for _ in range(7):
        step(opt)
        seen.append(len(rows))
    assert seen == [0, 0, 0, 0, 5, 5, 5]
    monitor.flush()
    monitor.flush()
    assert len(rows) == 7
    monitor.close()
    monitor.close()
    step(opt)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 7]
    assert not opt._optimizer_step_post_hooks and not opt._optimizer_step_pre_hooks


def test_a_copy_that_takes_long_is_waited_for_only_when_the_next_is_due(monkeypatch):
    """As on a GPU: a copy is done some steps after it was started."""
    rows: list[dict[str, float]] = []
    waited: list[int] = []
    done = False
    opt = make(telemetry=8)
    result = PendingTelemetry.result
    monkeypatch.setattr(PendingTelemetry, "done", lambda self: done)
    monkeypatch.setattr(
        PendingTelemetry, "result", lambda self: (waited.append(taken), result(self))[1]
    )
    taken = 0
    monitor = Monitor(opt, rows.append, every=4)
    waited.clear()
    for taken in range(1, 15):
        done = taken == 14
        step(opt)
    assert waited == [8, 12, 14]
    assert [row["step"] for row in rows] == list(range(1, 13))
    monitor.close()
    assert [row["step"] for row in rows] == list(range(1, 15))


def test_steps_that_raise_are_written_too():
    rows: list[dict[str, float]] = []
    opt = make(telemetry=4, nonfinite="raise")
    with Monitor(opt, rows.append, every=4):
        for number in range(20):
            if number % 5 == 0:
                step(opt)
            else:
                with pytest.raises(fusedopt.NonFiniteGradientError):
                    step(opt, "nan")
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert sum(row["skipped"] for row in rows) == 16


def test_a_monitor_begins_where_the_optimizer_is():
    rows: list[dict[str, float]] = []
    opt = make()
    for _ in range(11):
        step(opt)
    with Monitor(opt, rows.append):
        step(opt)
    with Monitor(opt, rows.append, first_step=501):
        step(opt)
        step(opt)
    assert [row["step"] for row in rows] == [12, 501, 502]


def test_steps_that_python_did_not_see_are_missed_with_a_word(monkeypatch):
    rows: list[dict[str, float]] = []
    opt = make(telemetry=4, cls=Steps)
    monitor = Monitor(opt, rows.append)
    for _ in range(9):  # as a CUDA graph is replayed
        opt._fused_step()
    with pytest.warns(RuntimeWarning, match="5 steps went by without this Monitor"):
        monitor.flush()
    assert [row["step"] for row in rows] == [6, 7, 8, 9]
    monitor.close()


def test_within_a_compiled_training_step():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    named = model.named_parameters()
    opt = fusedopt.FusedSGD(named, lr=0.1, telemetry=4, backend="reference")
    rows: list[dict[str, float]] = []

    @torch.compile(backend="eager")
    def train(inputs: Tensor) -> None:
        model(inputs).square().mean().backward()
        opt.step()
        opt.zero_grad()

    with Monitor(opt, rows.append, every=2):
        for _ in range(7):
            train(torch.randn(4, 3))
        assert len(rows) == 6
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 7]
    assert all(row["grad_norm"] > 0 for row in rows)


def test_a_copied_optimizer_has_no_monitor():
    opt = make()
    with Monitor(opt, print):
        other = copy.deepcopy(opt)
        assert not other._optimizer_step_post_hooks and not other._optimizer_step_pre_hooks
        step(other)


def test_a_monitor_that_is_dropped_writes_its_rows(tmp_path):
    opt = make()
    monitor = Monitor(opt, tmp_path / "run.jsonl")
    step(opt)
    del monitor, opt
    gc.collect()
    assert len(read_log(tmp_path / "run.jsonl").telemetry.step) == 1


@pytest.mark.parametrize("what", ["exit", "fork"])
def test_rows_are_out_when_python_exits_and_a_forked_child_writes_none(tmp_path, what):
    path = tmp_path / "run.jsonl"
    subprocess.run([sys.executable, "-c", SCRIPT, str(path), what], check=True)
    log = read_log(path)
    assert log.telemetry.step.tolist() == list(range(1, 9)) and log.damage is None
    assert path.read_text().count("\n") == 9  # and no row is there twice


@pytest.mark.parametrize("name", FORMATS)
def test_the_log_of_a_killed_run_is_readable_and_can_be_continued(tmp_path, name):
    path = tmp_path / name
    command = [sys.executable, "-c", SCRIPT, str(path), "run"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"running\n"
        time.sleep(0.2)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    log = read_log(path)
    count = len(log.telemetry.step)
    assert count >= 20 and count % 5 == 0
    assert log.telemetry.step.tolist() == list(range(1, count + 1))
    assert log.damage is None or "cut off" in log.damage

    with open(path, "ab") as file:  # what a kill within a write leaves
        file.write(path.read_bytes().splitlines()[-1][:30])
    assert "cut off in the middle" in str(read_log(path).damage)
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    options: Any = {"lr": 0.1, "max_grad_norm": 1.0, "telemetry": 16, "backend": "reference"}
    opt = fusedopt.FusedSGD([("weight", param)], **options)
    with Monitor(opt, path, first_step=count + 1):
        opt.step()
    log = read_log(path)
    assert log.damage is None
    assert log.telemetry.step.tolist() == list(range(1, count + 2))


def test_memory_does_not_grow_with_the_steps(tmp_path):
    """20,000 steps; benchmarks/long_run.py takes a million whole ones."""
    opt = make(telemetry=64, cls=Steps)
    with Monitor(opt, tmp_path / "run.jsonl"):
        tracemalloc.start()
        try:
            sizes = []
            for _ in range(4):
                for _ in range(5_000):
                    opt.step()
                gc.collect()
                sizes.append(tracemalloc.get_traced_memory()[0])
        finally:
            tracemalloc.stop()
    # A pointer per step would make 120,000; caches of the process come and go beside it.
    assert max(sizes[1:]) - sizes[0] < 100_000, sizes
    assert len(read_log(tmp_path / "run.jsonl").telemetry.step) == 20_000


# Arguments


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"every": 9}, ValueError, r"every is 9, but .* keeps 8 steps .* at most 8"),
        ({"every": 0}, ValueError, "Invalid every value: 0"),
        ({"every": 2.0}, TypeError, "every is a float"),
        ({"params_every": -1}, ValueError, "Invalid params_every value"),
        ({"first_step": -1}, ValueError, "first_step is -1"),
        ({"first_step": 1.5}, TypeError, "first_step is a float; expected an int"),
        ({"to": "run.txt"}, ValueError, r"'run.txt' ends in neither .jsonl nor .csv"),
        ({"to": 3}, TypeError, "to is a int; expected a path, a SummaryWriter or a function"),
    ],
)
def test_arguments_are_checked_before_anything_is_made(tmp_path, options, error, words):
    opt = make(telemetry=8)
    options = {"to": tmp_path / "run.jsonl", **options}
    with pytest.raises(error, match=words):
        Monitor(opt, options.pop("to"), **options)
    assert not list(tmp_path.iterdir())
    assert not opt._optimizer_step_post_hooks


def test_an_optimizer_without_telemetry_is_refused():
    opt = make(telemetry=None)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="keeps no telemetry; it is made with telemetry=N"):
        Monitor(opt, print)
    torch_opt: Any = torch.optim.SGD([torch.ones(1)], lr=0.1)
    with pytest.raises(TypeError, match="optimizer is a SGD; expected one of fusedopt's"):
        Monitor(torch_opt, print)


def test_names_with_commas_quotes_and_dots(tmp_path):
    params = [nn.Parameter(torch.ones(n)) for n in (1, 2, 3)]
    names = ['a,"b".c', "[red]x[/]", "ä"]
    opt = fusedopt.FusedSGD(list(zip(names, params)), lr=0.1, telemetry=4, backend="reference")
    with Monitor(opt, tmp_path / "run.csv"), Monitor(opt, tmp_path / "run.jsonl"):
        step(opt)
    for name in FORMATS:
        rows = read_log(tmp_path / name).telemetry
        assert list(rows.params) == names
        assert_rows(rows, opt.telemetry())
