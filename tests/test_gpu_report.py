"""The report for a GPU, as far as a CPU can try it: its motions, its words, its failures."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from test_build import ROOT, python

from benchmarks import gpu_build, gpu_stages

REPORT = ROOT / "benchmarks/gpu_report.py"


def dry_run(tmp_path, *arguments: str) -> tuple[str, dict]:
    done = python(REPORT, "--dry-run", "--output", tmp_path, "--case-seconds", "0", *arguments)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.json")
    return done.stdout, json.loads(path.read_text())


def test_motions(tmp_path):
    """Stages that work, one that can't on a CPU, and all of it in the file."""
    stages = ["copies", "speed", "host", "variants", "graphs"]
    wanted = [argument for stage in stages for argument in ("--stage", stage)]
    printed, report = dry_run(tmp_path, "--case", "tensors of 64", *wanted)
    assert report["dry_run"] is True and "gpu" not in report
    assert {row["suite"] for row in report["rows"]} == {"gpu", "host"}
    assert {row["side"] for row in report["rows"]} >= {"fusedopt", "torch fused", "torch foreach"}
    assert all(len(row["samples_ns"]) >= 11 for row in report["rows"])
    assert "a CPU has no CUDA graphs" in report["stages"]["graphs"]["error"]
    assert [name for name, stage in report["stages"].items() if "error" in stage] == ["graphs"]
    assert "DRY RUN" in printed and "FAILED graphs" in printed and "not measured:" in printed
    assert all(row["case"] in printed for row in report["rows"])


def test_no_time_is_reported_by_name(tmp_path):
    _, report = dry_run(tmp_path, "--stage", "speed", "--stage", "memory", "--seconds", "0")
    for stage in ("speed", "memory"):
        assert report["stages"][stage]["error"] == "TimeoutError: no time was left"


def test_nothing_is_measured_where_nothing_can_be():
    done = python(REPORT, CUDA_VISIBLE_DEVICES="")
    assert done.returncode != 0 and "finds no CUDA device" in done.stderr
    done = python(REPORT, "--dry-run")
    assert done.returncode != 0 and "--output of its own" in done.stderr


def test_a_program_that_takes_too_long_is_ended():
    code = "import time; print('begun', flush=True); time.sleep(60)"
    result = gpu_build.call([sys.executable, "-c", code], 2)
    assert result["status"] is None and "begun" in result["output"]


def test_what_is_built_is_imported_only_afterwards():
    code = "import sys, benchmarks.gpu_build; assert 'fusedopt' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_resources_are_read_from_nvccs_report(tmp_path):
    report = tmp_path / "cuda_passes.log"
    report.write_text(
        "ptxas info    : Compiling entry function 'kernel' for 'sm_90'\n"
        "ptxas info    : Function properties for kernel\n"
        "    0 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads\n"
        "ptxas info    : Used 126 registers, used 1 barriers\n"
    )
    found = {"kernel": "kernel", "registers": 126, "spilled_bytes": 12}
    assert gpu_build.resources([report]) == [found]


@pytest.mark.parametrize("name", gpu_build.VARIANTS)
def test_a_variant_is_where_the_build_leaves_it(name):
    folder = gpu_build.variant_folder(name)
    assert gpu_build.variant_library(name).relative_to(folder).parts[0] == "fusedopt"
    assert gpu_stages.variant_library is gpu_build.variant_library
