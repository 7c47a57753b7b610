"""The report for a GPU, as far as a CPU can test it: its stages, its output, its failures."""

from __future__ import annotations

import argparse
import ast
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_build import ROOT, python

import fusedopt
from benchmarks import gpu_build, gpu_report, gpu_stages
from benchmarks.comparisons import StepComparison
from fusedopt.core import backends

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
    assert "DRY RUN" in printed and "FAILED graphs" in printed
    for side in ("Apex", "flashoptim 8-bit"):
        assert f"not measured: {side}: " in printed
    assert all(row["case"] in printed for row in report["rows"])


def test_every_stage_belongs_to_one_part():
    stages = [stage for part in gpu_report.PARTS.values() for stage in part]
    assert sorted(stages) == sorted(gpu_stages.STAGES)


def test_no_time_is_reported_by_name(tmp_path):
    _, report = dry_run(tmp_path, "--stage", "speed", "--stage", "memory", "--seconds", "0")
    for stage in ("speed", "memory"):
        assert report["stages"][stage]["error"] == "TimeoutError: no time was left"


def dry_run_of(tmp_path, case_seconds: float = 0, **options) -> gpu_stages.Run:
    """A run in this process, with tiny cases."""
    given = {"dry_run": True, "case": None, "seconds": 560, "commit": None, "output": tmp_path}
    asked = argparse.Namespace(**given, case_seconds=case_seconds)
    vars(asked).update(options)
    return gpu_stages.Run(asked, gpu_stages.new_report(asked))


def test_a_case_that_fails_does_not_end_the_others(tmp_path, monkeypatch):
    """As where the states of all sides don't fit into the GPU's memory."""
    measure = StepComparison.run

    def run_out_of_memory(self, *arguments):
        if self.case.workload == "ResNet-50":
            raise torch.OutOfMemoryError("tried to allocate 20 GiB")
        return measure(self, *arguments)

    monkeypatch.setattr(StepComparison, "run", run_out_of_memory)
    run = dry_run_of(tmp_path, case="AdamW")
    gpu_stages.run_stages(run, ["speed"])
    failed = run.report["stages"]["speed"]["failed"]
    assert failed == {"AdamW, ResNet-50, clipped": "OutOfMemoryError: tried to allocate 20 GiB"}
    measured = {row["case"] for row in run.report["rows"]}
    assert measured == {case.title for case in run.cases()} - set(failed)
    lines = gpu_stages.lines_of(run.report)
    assert "FAILED AdamW, ResNet-50, clipped: OutOfMemoryError: tried to allocate 20 GiB" in lines


def test_the_last_cases_are_left_out_where_the_stages_behind_need_the_time(tmp_path, monkeypatch):
    run = dry_run_of(tmp_path, seconds=100.0)
    left = iter([90.0, 60.0, 30.0, *[20.0] * 100])
    monkeypatch.setattr(gpu_stages.Run, "seconds_left", lambda self: next(left))
    result = gpu_stages.speed(run)
    titles = [case.title for case in run.cases()]
    assert {row["case"] for row in run.report["rows"]} == set(titles[:3])
    assert result["left_out"] == titles[3:] and len(titles) == 22


def test_nothing_is_measured_where_nothing_can_be():
    done = python(REPORT, CUDA_VISIBLE_DEVICES="")
    assert done.returncode != 0 and "finds no CUDA device" in done.stderr
    done = python(REPORT, "--dry-run")
    assert done.returncode != 0 and "--output of its own" in done.stderr


def test_a_program_that_takes_too_long_is_ended():
    code = "import time; print('begun', flush=True); time.sleep(60)"
    result = gpu_build.call([sys.executable, "-c", code], 2)
    assert result["status"] is None and "begun" in result["output"]


def test_what_a_program_has_started_ends_with_it(tmp_path):
    """As pytest's workers, and what a sanitizer looks at: they would disturb the measurements."""
    late = tmp_path / "late"
    grandchild = f"import time; time.sleep(4); open({str(late)!r}, 'w')"
    code = "import subprocess, sys; print('begun', flush=True); "
    code += f"subprocess.run([sys.executable, '-c', {grandchild!r}])"
    result = gpu_build.call([sys.executable, "-c", code], 2)
    assert result["status"] is None and "begun" in result["output"]
    time.sleep(4)
    assert not late.exists()


def test_of_the_output_the_end_is_kept():
    code = "print('begun' + 'x' * 40_000 + 'end')"
    result = gpu_build.call([sys.executable, "-c", code], 60)
    assert result["status"] == 0 and result["output"] == "x" * (30_000 - 4) + "end\n"


def test_tests_that_need_a_gpu_are_selected_by_name():
    """As pytest's -k does: by names of tests and of their files, and by the fixture's parameter."""
    needs = "no CUDA here"
    found = []
    for path in (ROOT / "tests").glob("test_*.py"):
        text = path.read_text()
        for node in ast.parse(text).body:
            if needs in (ast.get_source_segment(text, node) or "") and path != Path(__file__):
                name = node.name if isinstance(node, ast.FunctionDef) else ""
                found.append(f"{path.name}::{name}")
    assert len(found) >= 3 and all("cuda" in name for name in found), found


def test_a_side_that_no_graph_captures_does_not_end_the_other(tmp_path, monkeypatch):
    def captured(step):
        step()
        if getattr(step, "__self__", None).__class__ is fusedopt.FusedAdamW:
            raise RuntimeError("operation not permitted")
        return step

    monkeypatch.setattr(gpu_stages, "captured", captured)
    run = dry_run_of(tmp_path, case="tensors of 64")
    (case,) = [it for it in run.cases() if it.mode == "plain"]  # whose steps are the optimizers'
    replays, failed = gpu_stages.replays_of(case, "cpu")
    assert failed == {"fusedopt": "RuntimeError: operation not permitted"}
    (step,) = replays.values()
    assert step.__self__.defaults["fused"] and step.__self__.defaults["capturable"]
    run.report["stages"]["graphs"] = {"failed": failed}
    assert f"FAILED fusedopt: {failed['fusedopt']}" in gpu_stages.lines_of(run.report)


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


def test_variants_are_not_taken_for_each_other(tmp_path, monkeypatch):
    """pybind11 knows a module by its name, and has it in memory already."""
    shipped = backends._C
    assert shipped is not None
    monkeypatch.setattr(gpu_stages, "variant_library", lambda name: tmp_path / name / "_C.so")
    for name in gpu_build.VARIANTS:
        (tmp_path / name).mkdir()
        shutil.copy(shipped.__file__, tmp_path / name / "_C.so")
    modules = gpu_stages.built_variants()
    assert {name: it.__file__ for name, it in modules.items()} == {
        name: str(tmp_path / name / "_C.so") for name in gpu_build.VARIANTS
    }
    plans = {id(it.Plan) for it in (shipped, *modules.values())}
    assert len(plans) == 1 + len(gpu_build.VARIANTS) >= 3
