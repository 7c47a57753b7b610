"""A Monitor continues a log of its own run, and doesn't touch other files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from monitored import FORMATS, SCRIPT, make, step
from torch import Tensor, nn

import fusedopt
from fusedopt import Monitor, read_log
from fusedopt.monitoring.plot import history_of

# Continuing a log


def log_run(path: Path, steps: int, first_step: int | None, checkpoint: Any = None) -> Any:
    """One process's part of a run. Returns its optimizer."""
    opt = make(cls=fusedopt.FusedAdam, telemetry=64)
    if checkpoint is not None:
        opt.load_state_dict(checkpoint)
    with Monitor(opt, path, first_step=first_step):
        for _ in range(steps):
            step(opt)
    return opt


def assert_steps(path: Path, norms: list[Tensor]) -> None:
    """Asserts that every reader finds exactly these steps, numbered from 1."""
    expected = torch.cat(norms)
    rows = read_log(path).telemetry
    assert rows.step.tolist() == list(range(1, len(expected) + 1))
    torch.testing.assert_close(rows.grad_norm, expected, rtol=1e-6, atol=0)
    history, reader = history_of(path)
    assert (history.first, history.last, reader.damage) == (1, len(expected), None)
    torch.testing.assert_close(history["norm_max"], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", FORMATS)
def test_a_resumed_run_continues_its_log(tmp_path, name):
    path = tmp_path / name
    first = log_run(path, 3, None)
    second = log_run(path, 2, 4, first.state_dict())
    assert_steps(path, [first.telemetry().grad_norm, second.telemetry().grad_norm])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("again", [2, 5, 8])
def test_the_steps_after_the_checkpoint_are_replaced(tmp_path, name, again):
    """A run that died in step 8 goes on from its checkpoint of step 3: not as far, as far, on."""
    path = tmp_path / name
    first = log_run(path, 8, None)
    second = log_run(path, again, 4)
    norms = [first.telemetry().grad_norm[:3], second.telemetry().grad_norm]
    assert not torch.equal(norms[1][:2], first.telemetry().grad_norm[3:5])
    assert_steps(path, norms)


@pytest.mark.parametrize("name", FORMATS)
def test_a_new_run_that_begins_at_step_1_replaces_all(tmp_path, name):
    path = tmp_path / name
    log_run(path, 8, 1)  # nothing was there yet
    assert_steps(path, [log_run(path, 5, 1).telemetry().grad_norm])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_run_that_does_not_say_where_it_is_touches_no_earlier_one(tmp_path, name, checkpoint):
    """Neither the same command again, nor one that resumed and didn't say so, mixes two runs."""
    path = tmp_path / name
    opt = log_run(path, 3, None)
    other = make(cls=fusedopt.FusedAdam)
    if checkpoint:
        other.load_state_dict(opt.state_dict())
    words = refusal(path, other)
    assert f"{path} has the steps of an earlier run, up to 3: " in words
    assert "first_step=(the checkpoint's) + 1" in words and "first_step=1;" in words
    assert not other._optimizer_step_post_hooks
    path.write_bytes(path.read_bytes() + path.read_bytes().splitlines()[-1][:30])
    assert "up to 3" in refusal(path, other)  # nor is the cut line of a killed run removed


@pytest.mark.parametrize("name", FORMATS)
def test_an_optimizer_whose_steps_come_later_continues_a_log_by_itself(tmp_path, name):
    path = tmp_path / name
    opt = make()
    for _ in range(2):
        with Monitor(opt, path):
            step(opt)
        step(opt)
    assert read_log(path).telemetry.step.tolist() == [1, 3]


@pytest.mark.parametrize("name", FORMATS)
def test_skips_of_a_resumed_run_are_its_own(tmp_path, name):
    for first, kind in ((None, "random"), (3, "inf")):
        opt = make()
        with Monitor(opt, tmp_path / name, first_step=first):
            for _ in range(5):
                step(opt, kind)
    rows = read_log(tmp_path / name).telemetry
    assert rows.step.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert rows.skipped.tolist() == [False] * 2 + [True] * 5


def test_parameters_that_come_later_get_a_header(tmp_path):
    opt = make()
    with Monitor(opt, tmp_path / "run.jsonl", every=4):
        for _ in range(2):
            step(opt)
        new = nn.Parameter(torch.ones(5))
        opt.add_param_group({"params": [("late", new)], "lr": 0.5})
        for _ in range(3):
            step(opt)
    lines = (tmp_path / "run.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["params"] == ["weight", "bias", "late"]  # of the first 4 rows
    rows = read_log(tmp_path / "run.jsonl").telemetry
    assert rows.step.tolist() == [1, 2, 3, 4, 5]
    assert rows.params["late"].grad_norm.isnan().tolist() == [True, True, False, False, False]
    assert rows.lr[:, 1].nan_to_num(0).tolist() == [0, 0, 0.5, 0.5, 0.5]


def test_a_header_between_rows(tmp_path):
    opt = make()
    with Monitor(opt, tmp_path / "run.jsonl", every=2):
        for _ in range(2):
            step(opt)
        opt.add_param_group({"params": [("late", nn.Parameter(torch.ones(5)))]})
        for _ in range(2):
            step(opt)
    kinds = ["fusedopt_log" in line for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert kinds == [True, False, False, True, False, False]
    rows = read_log(tmp_path / "run.jsonl").telemetry
    assert rows.params["late"].numel == 5
    assert rows.params["late"].grad_norm.isnan().tolist() == [True, True, False, False]


def test_csv_has_no_columns_for_parameters_that_come_later_and_says_so(tmp_path):
    opt = make()
    with Monitor(opt, tmp_path / "run.csv", every=2) as monitor:
        for _ in range(2):
            step(opt)
        opt.add_param_group({"params": [("late", nn.Parameter(torch.ones(5)))]})
        step(opt)
        with pytest.warns(RuntimeWarning, match=r"for .* 'late'; a \.jsonl log takes them"):
            monitor.flush()
        for _ in range(3):
            step(opt)
    log = read_log(tmp_path / "run.csv")
    assert log.damage is None and log.telemetry.step.tolist() == [1, 2, 3, 4, 5, 6]
    assert list(log.telemetry.params) == ["weight", "bias"] and log.telemetry.lr.shape == (6, 1)


# What is refused, and left as it is


def refusal(path: Path, opt: Any = None) -> str:
    before = path.read_bytes()
    with pytest.raises(FileExistsError) as caught:
        Monitor(opt or make(), path)
    assert path.read_bytes() == before
    return str(caught.value)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "content", [b"loss,accuracy\n1,2\n", b'{"loss":1}\n', b"\0" * 100, b"\n", b'{"fused": 1}']
)
def test_another_file_is_not_overwritten(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    assert f"{path} is not a " in refusal(path)


def test_the_log_of_the_other_format_is_not_continued(tmp_path):
    opt = make()
    for name, other in zip(FORMATS, reversed(FORMATS)):
        with Monitor(opt, tmp_path / name):
            step(opt)
        os.replace(tmp_path / name, tmp_path / f"other-{other}")
        assert "is not a" in refusal(tmp_path / f"other-{other}")


@pytest.mark.parametrize("name", FORMATS)
def test_the_log_of_another_model_is_not_continued(tmp_path, name):
    path = tmp_path / name
    with Monitor(opt := make(), path):
        step(opt)
    other = fusedopt.FusedSGD(
        nn.Sequential(nn.Linear(3, 2)).named_parameters(), telemetry=4, backend="reference"
    )
    assert "'weight'" in refusal(path, other)
    if name == "run.jsonl":  # a CSV doesn't say how large a parameter is
        larger = fusedopt.FusedSGD(
            nn.Linear(9, 2).named_parameters(), telemetry=4, backend="reference"
        )
        assert "'weight' has 6 elements there, and this optimizer has 18" in refusal(path, larger)


@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_end_is_not_continued(tmp_path, name):
    path = tmp_path / name
    with Monitor(opt := make(), path):
        step(opt)
    path.write_bytes(path.read_bytes() + b"\xff garbage\n")
    assert "is a damaged log" in refusal(path)


@pytest.mark.parametrize("name", FORMATS)
def test_a_log_without_a_whole_line_begins_anew(tmp_path, name):
    path = tmp_path / name
    with Monitor(opt := make(), path):
        step(opt)
    whole = path.read_bytes()
    for length in (0, 1, 10, 40):
        path.write_bytes(whole[:length])
        with Monitor(opt := make(), path):
            step(opt)
        assert read_log(path).telemetry.step.tolist() == [1]


def test_a_file_has_one_writer(tmp_path):
    path = tmp_path / "run.jsonl"
    opt = make()
    with Monitor(opt, path):
        step(opt)
        assert "is being written by another Monitor" in refusal(path)
    with Monitor(opt, path):
        step(opt)
    assert read_log(path).telemetry.step.tolist() == [1, 2]


def test_a_full_disk_ends_the_log_and_not_the_run(tmp_path):
    """The log of a limited size: the write is refused half-way, as by a full disk."""
    script = SCRIPT.replace("import os", "import os, resource, signal").replace(
        "param =",
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))\nparam =",
    )
    path = tmp_path / "run.jsonl"
    script = script.replace("number == 8", "number == 200")
    done = subprocess.run(
        [sys.executable, "-c", script, str(path), "exit"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("can't be written any more") == 1
    log = read_log(path)
    assert log.damage is None and len(log.telemetry.step) == 5
