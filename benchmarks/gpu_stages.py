"""The stages of gpu_report.py, and their results in words and tables."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import cases, peers, results, tables
from benchmarks.cases import Case
from benchmarks.comparisons import CEILING, Outcome, StepComparison, make_params
from benchmarks.gpu_build import VARIANTS, call, variant_library
from benchmarks.peers import OUR_SCALER, OUR_TELEMETRY, OURS
from benchmarks.timing import Effort, Step, interleaved
from fusedopt.core import backends

SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
PEERS = ["torch foreach", "torch fused", "Apex", "DeepSpeed", "bitsandbytes", "flashoptim 8-bit"]


@dataclass
class Run:
    """One run of this program."""

    options: argparse.Namespace
    report: dict[str, Any]
    started: float = field(default_factory=time.perf_counter)

    @property
    def device(self) -> str:
        return "cpu" if self.options.dry_run else "cuda"

    @property
    def effort(self) -> Effort:
        return Effort(self.options.case_seconds, rounds=11)

    def cases(self) -> list[Case]:
        """The cases that the command line selects. In a dry run they are tiny."""
        wanted = [it for it in cases.gpu_cases() if (self.options.case or "") in it.title]
        if not self.options.dry_run:
            return wanted
        return [replace(it, shapes=((64,),) * min(3, len(it.shapes))) for it in wanted]

    def keep(self, suite: str, title: str, case: Case, outcome: Outcome) -> None:
        """Adds the samples of a case to the report, and says which sides are missing."""
        rows = outcome.rows(suite, StepComparison(case), torch.get_num_threads())
        self.report["rows"] += [{**row, "case": title} for row in rows]
        for side, why in outcome.skipped.items():
            self.report["missing"].setdefault(side, f"{why.splitlines()[0][:100]} ({title})")

    def test_seconds(self) -> float:
        return min(self.options.test_seconds, self.seconds_left())

    def seconds_left(self) -> float:
        return self.options.seconds - (time.perf_counter() - self.started)


# ------------------------------------------------------------------------------------------ Stages


def tests(run: Run) -> dict[str, Any]:
    """The whole suite's GPU tests."""
    wanted = ["tests/test_arithmetic.py"] if run.options.dry_run else ["-k", "cuda"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *wanted]
    # Show every failure by itself: there may be no second run.
    command += ["--tb=short", "-rfE", "--continue-on-collection-errors"]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", "8"]
    result = call(command, run.test_seconds(), OMP_WAIT_POLICY="passive")
    result["summary"] = last_line(result["output"], "passed|failed|error")
    return result


def sanitize(run: Run) -> dict[str, Any]:
    """The self-check of all classes and dtypes under compute-sanitizer's tools, all at once."""
    folders = [f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin", os.environ["PATH"]]
    sanitizer = shutil.which("compute-sanitizer", path=os.pathsep.join(folders))
    if sanitizer is None:
        raise RuntimeError("there is no compute-sanitizer here")

    def check(tool: str) -> dict[str, Any]:
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
        if tool == "memcheck":  # torch asks CUDA for things that may not be there
            command += ["--report-api-errors", "no"]
        command += [sys.executable, "-m", "fusedopt", "--backend", "cuda"]
        result = call(command, run.test_seconds(), PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        result["summary"] = last_line(result["output"], "SUMMARY")
        return result

    with ThreadPoolExecutor() as pool:
        return dict(zip(SANITIZERS, pool.map(check, SANITIZERS), strict=True))


def last_line(text: str, pattern: str) -> str:
    lines = [line for line in text.splitlines() if re.search(pattern, line)]
    return lines[-1].strip("= ") if lines else "no summary"


def copies(run: Run) -> dict[str, Any]:
    """The speed of a plain copy of 4 GiB, in bytes read and written per second."""
    elements = 1 << (10 if run.options.dry_run else 30)
    source = torch.randn(elements, device=run.device)
    target = torch.empty_like(source)
    samples = interleaved({"copy": lambda: target.copy_(source)}, run.device, run.effort)["copy"]
    return {"bytes_per_second": [8 * elements / seconds for seconds in samples]}


def speed(run: Run) -> dict[str, Any]:
    """Every case, the most important first. A failing case doesn't end the stage."""
    left_out, failed = [], {}
    for case in run.cases():
        if run.seconds_left() < 0.25 * run.options.seconds:  # the later stages need this time
            left_out.append(case.title)
            continue
        single = len(case.shapes) == 1 and not run.options.dry_run
        extra = ["torch compiled", CEILING] if single else []
        sides = [OURS, OUR_SCALER, OUR_TELEMETRY, *PEERS, *extra]
        try:
            run.keep(
                "gpu", case.title, case, StepComparison(case).run(sides, run.device, run.effort)
            )
        except Exception as error:  # for example, all sides' states don't fit into memory
            failed[case.title] = f"{type(error).__name__}: {error}"
        if run.device == "cuda":
            torch.cuda.empty_cache()
    return {"left_out": left_out, "failed": failed}


def host(run: Run) -> dict[str, Any]:
    """How long `step()` keeps the host while the device is idle."""
    for case in run.cases():
        if case.workload == "1,000 tensors of 64":
            # By the host's clock. Each step starts after all earlier work on the device has ended.
            wait = torch.cuda.synchronize if run.device == "cuda" else None
            samples = interleaved(steps_of(case, run), "cpu", run.effort, wait)
            run.keep("host", f"host: {case.title}", case, Outcome(samples, {}))
    return {}


def graphs(run: Run) -> dict[str, Any]:
    """Steps replayed from CUDA graphs, ours and torch's in turn."""
    if run.device == "cpu":
        raise RuntimeError("a CPU has no CUDA graphs")
    failed = {}
    for case in run.cases():
        if case.workload in ("1,000 tensors of 64", "ResNet-50"):
            title = f"graph: {case.title}"
            replays, reasons = replays_of(case, run.device)
            failed |= {f"{title}, {side}": reason for side, reason in reasons.items()}
            samples = interleaved(replays, run.device, run.effort)
            run.keep("graph", title, case, Outcome(samples, {}))
    return {"failed": failed}


def replays_of(case: Case, device: str) -> tuple[dict[str, Step], dict[str, str]]:
    """A function that replays each side's step; or the reason why there is none."""
    params = make_params(case, device)
    replays, failed = {}, {}
    for side in peers.IN_GRAPHS:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's warn of steps that come before a capture
                step, _ = peers.make_step(side, case, params, peers.IN_GRAPHS)
                replays[side] = captured(step)
        except Exception as error:
            failed[side] = f"{type(error).__name__}: {error}"
    return replays, failed


def steps_of(case: Case, run: Run) -> dict[str, Step]:
    params = make_params(case, run.device)
    steps = {side: peers.make_step(side, case, params)[0] for side in (OURS, "torch fused")}
    for step in steps.values():
        step()
    return steps


def captured(step: Step) -> Step:
    current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    current.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
    finally:
        torch.cuda.set_stream(current)  # if a capture fails at its end, torch leaves its own stream
    return lambda: (graph.replay(), step)  # the lambda keeps the step's memory alive


def variants(run: Run) -> dict[str, Any]:
    """Our step, as shipped and with the other builds of gpu_build, in turn."""
    shipped: Any = backends._C
    modules = {OURS: shipped, **built_variants()}
    for case in run.cases():
        if case.workload != "one tensor of 100M" or case.mode == "amp":
            continue
        steps = {}
        for name, module in modules.items():
            backends._C = module
            steps[name], _ = peers.make_step(OURS, case, make_params(case, run.device))
            steps[name]()  # makes the plan, which keeps using this module
        backends._C = shipped
        samples = interleaved(steps, run.device, run.effort)
        run.keep("variants", f"built otherwise: {case.title}", case, Outcome(samples, {}))
    return {}


def built_variants() -> dict[str, Any]:
    """The extension's other builds, those that exist."""
    modules = {}
    for name in VARIANTS:
        path = variant_library(name)
        if path.exists():
            # In a package of its own: for the same name pybind11 would return the first module.
            package = name.replace(" ", "_")
            spec = importlib.util.spec_from_file_location(f"{package}._C", path)
            assert spec is not None and spec.loader is not None
            modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(modules[name])
    return modules


def memory(run: Run) -> dict[str, Any]:
    """Memory beyond parameters, gradients and states, in bytes: between steps, and the peak."""
    if run.device == "cpu":
        raise RuntimeError("torch counts a GPU's memory only")
    rows = []
    for case in cases.gpu_cases():
        if case.mode != "clip" or case.optimizer != "AdamW":
            continue
        params = make_params(case, run.device)
        _, optimizer = peers.make_step(OURS, case, params)
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        optimizer.step()
        states = [t for p in params for t in optimizer.state[p].values()]
        owned = sum(t.numel() * t.element_size() for t in states)
        torch.cuda.reset_peak_memory_stats()
        optimizer.step()
        stats = torch.cuda.memory_stats()
        rows.append({
            "case": case.title,
            "kept_bytes": stats["requested_bytes.all.current"] - before - owned,
            "peak_bytes": stats["requested_bytes.all.peak"] - before - owned,
            "promised_bytes": (1 << 20) + 64 * len(params),
        })  # fmt: skip
        del optimizer, params, states
        torch.cuda.empty_cache()
    return {"rows": rows}


STAGES: dict[str, Callable[[Run], dict[str, Any]]] = {
    "tests": tests,
    "sanitize": sanitize,
    "copies": copies,
    "speed": speed,
    "host": host,
    "variants": variants,
    "graphs": graphs,
    "memory": memory,
}

# ------------------------------------------------------------------------------------------ Report


def run_stages(run: Run, stages: Iterable[str]) -> Path:
    """Runs the stages. Returns the path of the report."""
    for name in stages:
        start = time.perf_counter()
        result: dict[str, Any]
        print(f"--- {name}", flush=True)
        try:
            if run.seconds_left() <= 0:
                raise TimeoutError("no time was left")
            result = STAGES[name](run)
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}", "where": traceback.format_exc()}
            print(f"    {result['error'][:500]}", flush=True)
        result["stage_seconds"] = round(time.perf_counter() - start, 1)
        print(f"    {result['stage_seconds']} s", flush=True)
        run.report["stages"][name] = result
        save(run)  # after every stage, so that results are kept if the program is stopped
    return save(run)


def save(run: Run) -> Path:
    kind = "dry-run" if run.options.dry_run else "gpu"
    return results.save(run.report, [kind], run.options.output)


def lines_of(report: dict[str, Any]) -> list[str]:
    """The report in words and tables."""
    stages = report["stages"]
    lines = ["DRY RUN on a CPU: times below mean nothing"] if report["dry_run"] else []
    lines += tables.as_text(report)
    for row in stages.get("memory", {}).get("rows", []):
        lines.append("extra memory, {case}: at most {peak_bytes:,} bytes of {promised_bytes:,}"
                     .format(**row))  # fmt: skip
    if rates := stages.get("copies", {}).get("bytes_per_second"):
        lines.append(f"plain copy: {sorted(rates)[len(rates) // 2] / 1e12:.2f} TB/s")
    for kernel in stages.get("build", {}).get("resources", []):
        lines.append("{registers:4d} registers, {spilled_bytes} bytes spilled: {kernel}"
                     .format(**kernel))  # fmt: skip
    if "summary" in stages.get("tests", {}):
        lines.append(f"tests: {stages['tests']['summary']}")
    for tool in SANITIZERS:
        if tool in stages.get("sanitize", {}):
            result = stages["sanitize"][tool]
            lines.append(f"{tool}: status {result['status']}, {result['summary']}")
    lines += [f"not measured: {side}: {why}" for side, why in sorted(report["missing"].items())]
    speed = stages.get("speed", {})
    lines += [f"no time for: {it}" for it in speed.get("left_out", [])]
    failed = {**speed.get("failed", {}), **stages.get("graphs", {}).get("failed", {})}
    lines += [f"FAILED {it}: {why[:200]}" for it, why in failed.items()]
    lines += [f"FAILED {n}: {s['error'][:200]}" for n, s in stages.items() if "error" in s]
    return lines


def new_report(options: argparse.Namespace) -> dict[str, Any]:
    report = results.new_report("cpu" if options.dry_run else "cuda")
    report |= {"dry_run": options.dry_run, "stages": {}, "missing": {}}
    report["commit"] = options.commit or report["commit"]
    report["versions"]["cuda_of_torch"] = torch.version.cuda
    if not options.dry_run:
        properties = torch.cuda.get_device_properties(0)
        report["gpu"] = {
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "devices": torch.cuda.device_count(),
            "nvidia_smi": subprocess.getoutput("nvidia-smi --format=csv --query-gpu="
                                               "driver_version,clocks.sm,clocks.mem,power.draw"),
        }  # fmt: skip
    return report
