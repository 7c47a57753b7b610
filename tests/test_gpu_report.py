"""The report for a GPU, as far as a CPU can try it: its motions, its table, its failures."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from test_build import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu_cases  # pyright: ignore[reportMissingImports]
import gpu_report  # pyright: ignore[reportMissingImports]


def dry_run(tmp_path, *arguments: str) -> tuple[str, dict]:
    command = [sys.executable, str(ROOT / "benchmarks/gpu_report.py"), "--dry-run"]
    command += ["--output", str(tmp_path), "--case-seconds", "0", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.json")
    return done.stdout, json.loads(path.read_text())


def test_motions(tmp_path):
    """Stages that work, one that can't on a CPU, and all of it in the file."""
    printed, report = dry_run(
        tmp_path, "--stage", "speed", "--stage", "host", "--stage", "graphs", "--case", "NAdam"
    )
    assert report["dry_run"] is True and "hardware" not in report
    (row,) = report["stages"]["speed"]["rows"]
    assert set(row["samples_ns"]) == {"fusedopt", "torch foreach"}
    assert all(len(samples) >= 11 for samples in row["samples_ns"].values())
    assert len(report["stages"]["host"]["rows"]) == 2
    assert "a CPU has no CUDA graphs" in report["stages"]["graphs"]["error"]
    assert "DRY RUN" in printed and "FAILED graphs" in printed and row["case"] in printed


def test_no_time_is_reported_by_name(tmp_path):
    _, report = dry_run(tmp_path, "--stage", "speed", "--stage", "memory", "--seconds", "0")
    assert report["stages"]["speed"] == report["stages"]["memory"] == {"error": "no time was left"}


def test_nothing_is_measured_where_nothing_can_be(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks/gpu_report.py")]
    environment = {"CUDA_VISIBLE_DEVICES": "", "PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode != 0 and "finds no CUDA device" in done.stderr
    done = subprocess.run([*command, "--dry-run"], capture_output=True, text=True, env=environment)
    assert done.returncode != 0 and "--output of its own" in done.stderr


def test_a_program_that_takes_too_long_is_ended(tmp_path):
    run = gpu_report.Run(gpu_report.argparse.Namespace(seconds=60, dry_run=True), {})
    code = "import time; print('begun', flush=True); time.sleep(60)"
    result = run.call([sys.executable, "-c", code], 2)
    assert result["status"] is None and "begun" in result["output"]


def test_line_of_a_row():
    samples = {
        "fusedopt": [4_000_000, 2_000_000, 3_000_000],
        "torch fused": [9_000_000],
        "torch foreach": [6_000_000],
        "apex": [5_000_000],
        "ceiling": [1_500_000],
    }
    line = gpu_report.line_of({"case": "name", "samples_ns": samples})
    assert line.split() == "name 3.000 6.000 2.00 50.0% apex 5.000".split()
    line = gpu_report.line_of({"case": "name", "samples_ns": {"torch fused": [1_000_000]}})
    assert line.split() == "name - 1.000 - -".split()


def test_resources_are_read_from_nvccs_report(tmp_path):
    report = tmp_path / "cuda_resources.txt"
    report.write_text(
        "ptxas info    : Compiling entry function 'kernel' for 'sm_90'\n"
        "ptxas info    : Function properties for kernel\n"
        "    0 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads\n"
        "ptxas info    : Used 126 registers, used 1 barriers\n"
    )
    (found,) = gpu_report.resources([report])
    assert found["registers"] == 126 and found["spilled_bytes"] == 12
    assert found["blocks_per_multiprocessor"] == 2
    assert gpu_report.blocks_per_multiprocessor(64) == 4
    assert gpu_report.blocks_per_multiprocessor(18) == 8


def test_every_class_is_a_case_and_counts_its_arrays():
    cases = gpu_cases.all_cases(1e-6)
    assert {case.optimizer for case in cases} == {"Adam", "AdamW", "NAdam", "RMSprop", "SGD"}
    for case in cases:
        if len(case.shapes) > 1:
            continue
        params = gpu_cases.make_params(case.shapes, case.dtype, "cpu")
        optimizer = gpu_cases.make_optimizer("fusedopt", case, params)
        optimizer.step()
        states = [t for t in optimizer.state[params[0]].values() if t.shape == params[0].shape]
        assert case.arrays == 1 + len(states), case.title


def test_sides_that_are_not_there_say_why():
    case = gpu_cases.Case("", ((4,),), "RMSprop")
    params = gpu_cases.make_params(case.shapes, case.dtype, "cpu")
    with pytest.raises(gpu_cases.Unavailable, match="RMSprop has no fused"):
        gpu_cases.make_optimizer("torch fused", case, params)
