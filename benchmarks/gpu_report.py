"""All that a GPU has to tell of this project, in one command: tests, sanitizers, measurements.

    python benchmarks/gpu_report.py [--seconds 560] [--output benchmarks/results]

Builds the extension, runs the stages below one after another, prints a short table last, and writes
one JSON with the raw samples, hardware, versions and commit. A stage that fails, or has no time
left, is reported and the others go on. Torch, nvcc, ninja, pybind11, pytest and a C++ compiler are
all it needs; libraries to compare with that are missing are named.

--dry-run goes through the same motions on a CPU with small tensors: what it prints and writes is
marked as such, and measures nothing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")

# What a choice of ours costs: the same kernels built otherwise. Their bits differ; nothing else
# uses them.
VARIANTS = {
    "with FMA": ["-fmad=true"],
    "sums in float32": ["-DFUSEDOPT_EXPERIMENT_FLOAT_SUMS"],
}


@dataclass
class Run:
    """One run of this program."""

    options: argparse.Namespace
    report: dict[str, Any]
    work: Path = ROOT / "build/gpu_report"
    started: float = field(default_factory=time.perf_counter)

    @property
    def device(self) -> str:
        return "cpu" if self.options.dry_run else "cuda"

    def seconds_left(self) -> float:
        return self.options.seconds - (time.perf_counter() - self.started)

    def call(self, command: list[Any], limit: float, **environment: str) -> dict[str, Any]:
        """Runs a program for at most that long. Returns its status (None: too long) and output."""
        limit = max(1.0, min(limit, self.seconds_left()))
        start = time.perf_counter()
        status, output = None, ""
        try:
            done = subprocess.run(
                list(map(str, command)), cwd=ROOT, env={**os.environ, **environment},
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=limit,
            )  # fmt: skip
            status, output = done.returncode, done.stdout
        except subprocess.TimeoutExpired as late:
            raw = late.stdout or b""
            output = raw.decode(errors="replace") if isinstance(raw, bytes) else raw
        seconds = round(time.perf_counter() - start, 1)
        return {"status": status, "seconds": seconds, "output": output[-8000:]}


def first_of(names: Iterable[str]) -> str | None:
    folders = ["/usr/local/cuda/bin", *(f"{os.environ[k]}/bin" for k in ("CUDA_HOME",) if
                                       k in os.environ)]  # fmt: skip
    for name in names:
        found = shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))
        if found:
            return found
    return None


def require(tool: str) -> str:
    found = first_of([tool])
    if found is None:
        raise RuntimeError(f"there is no {tool} here")
    return found


# ------------------------------------------------------------------------------------------ Stages


def build(run: Run) -> dict[str, Any]:
    """The extension, its variants, and the kernels of the ceiling, as far as possible at once."""
    import torch

    if run.options.dry_run:
        return {"skipped": "a dry run takes what has been built"}
    import gpu_ceiling

    major, minor = torch.cuda.get_device_capability()
    nvcc = require("nvcc")
    setup = load_setup()
    variants = {}
    for name, flags in VARIANTS.items():
        target = variant_object(run, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        gencode = f"-gencode=arch=compute_{major}{minor},code=sm_{major}{minor}"
        command = [nvcc, *setup.NVCC_FLAGS, gencode, "-Xcompiler=-fPIC", *flags, "-c",
                   ROOT / "csrc/cuda/passes.cu", "-o", target]  # fmt: skip
        variants[name] = subprocess.Popen(
            list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
    result = run.call(
        [sys.executable, "setup.py", "build_ext", "--inplace"], 400,
        FUSEDOPT_CUDA="1", TORCH_CUDA_ARCH_LIST=f"{major}.{minor}",
    )  # fmt: skip
    if result["status"] != 0:
        for process in variants.values():
            process.kill()
        raise RuntimeError(f"the build failed: {result['output'][-2000:]}")
    gpu_ceiling.build(nvcc, run.work, f"{major}{minor}")
    result["variants"] = {name: process.wait() for name, process in variants.items()}
    for name, status in result["variants"].items():
        if status == 0:
            link_variant(run, name)
    result["resources"] = resources(ROOT.glob("build/temp*/cuda_resources.txt"))
    return result


def load_setup() -> Any:
    import importlib.util

    spec = importlib.util.spec_from_file_location("fusedopt_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def variant_object(run: Run, name: str) -> Path:
    return run.work / name.replace(" ", "_") / "cuda_passes.o"


def variant_library(run: Run, name: str) -> Path:
    import sysconfig

    return variant_object(run, name).with_name(f"_C{sysconfig.get_config_var('EXT_SUFFIX')}")


def link_variant(run: Run, name: str) -> None:
    """The extension's own objects with other kernels."""
    from torch.utils.cpp_extension import library_paths

    setup = load_setup()
    runtime = setup.static_runtime(setup.cuda_root(setup.find_nvcc()))
    objects = sorted(ROOT.glob("build/temp*/csrc/**/*.o"))
    search = [flag for path in library_paths() for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]
    libraries = ["-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_python", "-fopenmp", "-ldl", "-lrt"]
    compiler = os.environ.get("CXX", "c++").split()
    command = [*compiler, "-shared", *objects, variant_object(run, name), runtime, *search,
               *libraries, "-lpthread", "-o", variant_library(run, name)]  # fmt: skip
    subprocess.run(list(map(str, command)), check=True, capture_output=True)


def resources(reports: Iterable[Path]) -> list[dict[str, Any]]:
    """Registers and spills of each kernel, as nvcc's report has them, and the blocks they allow."""
    found = []
    for report in reports:
        for part in report.read_text().split("Compiling entry function ")[1:]:
            name = re.match(r"'(\S+)'", part)
            registers = re.search(r"Used (\d+) registers", part)
            spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
            if name is None or registers is None:
                continue
            used = int(registers[1])
            found.append({
                "kernel": name[1],
                "registers": used,
                "spilled_bytes": sum(map(int, spills.groups())) if spills else 0,
                "blocks_per_multiprocessor": blocks_per_multiprocessor(used),
            })  # fmt: skip
    return found


def blocks_per_multiprocessor(registers: int, threads: int = 256) -> int:
    """As far as registers go: a multiprocessor has 65,536, given out by 8 to each thread, and up to
    2,048 threads (fewer on 7.5, 8.6, 8.9 and 12.0)."""
    return min(2048 // threads, 65536 // (-(-registers // 8) * 8 * threads))


def tests(run: Run) -> dict[str, Any]:
    """The whole suite's GPU tests."""
    wanted = "cpu and test_parity" if run.options.dry_run else "cuda"
    command = [sys.executable, "-m", "pytest", "-q", "-k", wanted, "-p", "no:cacheprovider"]
    if run.options.dry_run:
        command.append("tests/test_parity.py")
    try:
        import xdist  # noqa: F401  # pyright: ignore[reportMissingImports]

        command += ["-n", "2" if run.options.dry_run else "8"]
    except ImportError:
        pass
    result = run.call(command, run.options.test_seconds, OMP_WAIT_POLICY="passive")
    result["summary"] = last_line(result["output"], "passed|failed|error")
    return result


def sanitize(run: Run) -> dict[str, Any]:
    """The self-check of all classes and dtypes under compute-sanitizer, its tools side by side."""
    sanitizer = require("compute-sanitizer")

    def check(tool: str) -> dict[str, Any]:
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
        command += [sys.executable, "-m", "fusedopt", "--backend", "cuda"]
        result = run.call(command, run.options.test_seconds, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        result["summary"] = last_line(result["output"], "SUMMARY")
        return result

    with ThreadPoolExecutor() as pool:
        return dict(zip(SANITIZERS, pool.map(check, SANITIZERS), strict=True))


def last_line(text: str, pattern: str) -> str:
    lines = [line for line in text.splitlines() if re.search(pattern, line)]
    return lines[-1].strip("= ") if lines else "no summary"


def speed(run: Run) -> dict[str, Any]:
    """Every case, all sides in turn; the most telling first."""
    import gpu_cases
    import torch

    rows, left_out = [], []
    cases = gpu_cases.all_cases(1e-4 if run.options.dry_run else 1.0)
    reserve = 0.25 * run.options.seconds  # for the stages behind this one
    for case in cases:
        if run.options.case and run.options.case not in case.title:
            continue
        if run.seconds_left() < reserve:
            left_out.append(case.title)
            continue
        rows.append(measure_case(run, case))
        if run.device == "cuda":
            torch.cuda.empty_cache()
    return {"rows": rows, "left_out": left_out}


def measure_case(run: Run, case: Any) -> dict[str, Any]:
    import gpu_cases
    import torch

    steps: dict[str, Callable[[], object]] = {}
    missing: dict[str, str] = {}
    sides = [gpu_cases.OURS, *case.sides]
    if case.mode == "amp":
        sides.append(gpu_cases.OUR_SCALER)
    for side in sides:
        if run.options.dry_run and side == "torch compiled":
            missing[side] = "not in a dry run"
            continue
        try:
            params = gpu_cases.make_params(case.shapes, case.dtype, run.device)
            step = gpu_cases.make_step(side, case, params)
            step()
            steps[side] = step
        except Exception as error:
            missing[side] = f"{type(error).__name__}: {error}"
    row = {"case": case.title, "elements": case.elements, "tensors": len(case.shapes)}
    ceiling = None
    if case.ceiling and run.device == "cuda":
        try:
            import gpu_ceiling

            # Elements of 2 bytes are half as many float32.
            elements = case.elements * case.dtype.itemsize // 4
            library = run.work / "gpu_ceiling.so"
            ceiling = gpu_ceiling.Ceiling(library, elements, case.arrays, case.mode != "plain")
            steps["ceiling"] = ceiling
            row["bytes"] = ceiling.bytes
        except Exception as error:
            missing["ceiling"] = f"{type(error).__name__}: {error}"
    samples = gpu_cases.interleaved(
        steps, run.options.case_seconds, lambda step: gpu_cases.timed(step, run.device)
    )
    del steps, ceiling
    if run.device == "cuda":
        torch.cuda.synchronize()
    return {**row, "samples_ns": nanoseconds(samples), "missing": missing}


def nanoseconds(samples: dict[str, list[float]]) -> dict[str, list[int]]:
    return {side: [round(s * 1e9) for s in values] for side, values in samples.items()}


def variants(run: Run) -> dict[str, Any]:
    """Our step, built as it ships and built otherwise, in turn."""
    import importlib.util

    import gpu_cases

    from fusedopt import backends

    shipped: Any = backends._C
    modules = {"as it ships": shipped}
    for name in VARIANTS:
        path = variant_library(run, name)
        if not path.exists():
            continue
        spec = importlib.util.spec_from_file_location("_C", path)
        assert spec is not None and spec.loader is not None
        modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(modules[name])
    rows = []
    cases = gpu_cases.all_cases(1e-4 if run.options.dry_run else 1.0)
    wanted = [case for case in cases if case.workload == "100M" and case.mode != "amp"]
    for case in wanted[:4]:
        steps = {}
        for name, module in modules.items():
            backends._C = module
            params = gpu_cases.make_params(case.shapes, case.dtype, run.device)
            steps[name] = gpu_cases.make_step(gpu_cases.OURS, case, params)
            steps[name]()  # which makes the plan: it stays with this module
        backends._C = shipped
        samples = gpu_cases.interleaved(
            steps, run.options.case_seconds, lambda step: gpu_cases.timed(step, run.device)
        )
        rows.append({"case": case.title, "samples_ns": nanoseconds(samples)})
    return {"rows": rows}


def host(run: Run) -> dict[str, Any]:
    """How long `step()` keeps the host, with an idle device: 1,000 tensors."""
    import gpu_cases
    import torch

    def on_host(step: Callable[[], object]) -> float:
        if run.device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    rows = []
    for mode in ("plain", "clip"):
        case = gpu_cases.Case("1,000 of 64", ((64,),) * 1000, mode=mode)
        steps = {}
        for side in (gpu_cases.OURS, "torch fused"):
            params = gpu_cases.make_params(case.shapes, case.dtype, run.device)
            steps[side] = gpu_cases.make_step(side, case, params)
        samples = gpu_cases.interleaved(steps, run.options.case_seconds, on_host)
        rows.append({"case": f"host: {case.title}", "samples_ns": nanoseconds(samples)})
    return {"rows": rows}


def memory(run: Run) -> dict[str, Any]:
    """Bytes beyond parameters, gradients and states: kept between steps, and at most in a step."""
    import gpu_cases
    import torch

    if run.device == "cpu":
        raise RuntimeError("torch counts a GPU's memory only")
    rows = []
    for shapes in (((100_000_000,),), ((1024,),) * 10_000, ((64,),) * 1000):
        params = gpu_cases.make_params(shapes, torch.float32, "cuda")
        case = gpu_cases.Case("", shapes)
        optimizer = gpu_cases.make_optimizer(gpu_cases.OURS, case, params)
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        optimizer.step()
        states = [t for p in params for t in optimizer.state[p].values()]
        owned = sum(t.numel() * t.element_size() for t in states)
        torch.cuda.reset_peak_memory_stats()
        optimizer.step()
        stats = torch.cuda.memory_stats()
        rows.append({
            "tensors": len(shapes),
            "kept_bytes": stats["requested_bytes.all.current"] - before - owned,
            "peak_bytes": stats["requested_bytes.all.peak"] - before - owned,
            "promised_bytes": (1 << 20) + 64 * len(shapes),
        })  # fmt: skip
        del optimizer, params, states
        torch.cuda.empty_cache()
    return {"rows": rows}


def graphs(run: Run) -> dict[str, Any]:
    """Steps replayed from CUDA graphs, ours and torch's in turn."""
    import gpu_cases
    import torch

    if run.device == "cpu":
        raise RuntimeError("a CPU has no CUDA graphs")
    rows = []
    cases = [
        case for case in gpu_cases.all_cases() if case.workload in ("1,000 of 64", "ResNet-50")
    ]
    for case in cases:
        replays: dict[str, Callable[[], object]] = {}
        for side in (gpu_cases.OURS, "torch fused"):
            params = gpu_cases.make_params(case.shapes, case.dtype, "cuda")
            step = gpu_cases.make_step(side, case, params)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    step()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            replays[side] = keep(graph.replay, params, step)
        samples = gpu_cases.interleaved(
            replays, run.options.case_seconds, lambda step: gpu_cases.timed(step, "cuda")
        )
        rows.append({"case": f"graph: {case.title}", "samples_ns": nanoseconds(samples)})
    return {"rows": rows}


def keep(call: Callable[[], object], *owners: object) -> Callable[[], object]:
    return lambda: (call(), owners)


def copies(run: Run) -> dict[str, Any]:
    """What a plain copy of 4 GiB reaches, in bytes read and written per second."""
    import gpu_ceiling

    if run.device == "cpu":
        raise RuntimeError("the ceiling's kernels are CUDA's")
    return {"bytes_per_second": gpu_ceiling.copy_rate()}


STAGES: dict[str, Callable[[Run], dict[str, Any]]] = {
    "build": build,
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


def run_stages(run: Run, stages: dict[str, Callable[[Run], dict[str, Any]]]) -> None:
    for name, stage in stages.items():
        if run.seconds_left() <= 0:
            run.report["stages"][name] = {"error": "no time was left"}
            continue
        start = time.perf_counter()
        print(f"--- {name}", flush=True)
        try:
            result = stage(run)
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}", "where": traceback.format_exc()}
            print(f"    {result['error'][:500]}", flush=True)
        result["stage_seconds"] = round(time.perf_counter() - start, 1)
        print(f"    {result['stage_seconds']} s", flush=True)
        run.report["stages"][name] = result
        save(run)  # after every stage: whatever ends this program, what was measured stays


def save(run: Run) -> Path:
    run.options.output.mkdir(parents=True, exist_ok=True)
    kind = "dry_run" if run.options.dry_run else "gpu"
    path = run.options.output / f"{kind}_{run.report['date'][:10]}_{run.report['commit'][:12]}.json"
    path.write_text(json.dumps(run.report, indent=1) + "\n")
    return path


def table(report: dict[str, Any]) -> list[str]:
    """The report in a few lines."""
    stages = report["stages"]
    lines = []
    if report["dry_run"]:
        lines.append("DRY RUN on a CPU: times below mean nothing")
    lines.append(
        f"{'median ms':50s} {'ours':>9s} {'torch':>9s} {'ratio':>6s} {'ceiling':>8s}  fastest other"
    )
    for name in ("speed", "host", "graphs"):
        lines += [line_of(row) for row in stages.get(name, {}).get("rows", [])]
    for row in stages.get("variants", {}).get("rows", []):
        medians = {side: statistics.median(s) for side, s in row["samples_ns"].items()}
        shipped = medians.pop("as it ships")
        costs = (f"{side} {value / shipped:.3f}" for side, value in medians.items())
        lines.append(f"{row['case']:50s} time of this build: 1, {', '.join(costs)}")
    for row in stages.get("memory", {}).get("rows", []):
        lines.append(f"extra memory, {row['tensors']:,} tensors: at most {row['peak_bytes']:,} "
                     f"bytes of {row['promised_bytes']:,}")  # fmt: skip
    for rate in [stages.get("copies", {}).get("bytes_per_second")]:
        if rate:
            lines.append(f"plain copy: {statistics.median(rate) / 1e12:.2f} TB/s")
    for kernel in stages.get("build", {}).get("resources", []):
        lines.append(
            "{registers:4d} registers, {spilled_bytes} bytes spilled, "
            "{blocks_per_multiprocessor} blocks: {kernel}".format(**kernel)
        )
    if "summary" in stages.get("tests", {}):
        lines.append(f"tests: {stages['tests']['summary']}")
    for tool in SANITIZERS:
        if tool in stages.get("sanitize", {}):
            result = stages["sanitize"][tool]
            lines.append(f"{tool}: status {result['status']}, {result['summary']}")
    missing = {
        f"{side}: {why.splitlines()[0][:100]}"
        for row in stages.get("speed", {}).get("rows", [])
        for side, why in row["missing"].items()
    }
    lines += [f"not measured: {it}" for it in sorted(missing)]
    lines += [f"no time for: {it}" for it in stages.get("speed", {}).get("left_out", [])]
    lines += [f"FAILED {n}: {s['error'][:200]}" for n, s in stages.items() if "error" in s]
    return lines


def line_of(row: dict[str, Any]) -> str:
    medians = {side: statistics.median(s) / 1e6 for side, s in row["samples_ns"].items() if s}
    ours = min((t for side, t in medians.items() if side.startswith("fusedopt")), default=None)
    torchs = min((t for side, t in medians.items() if side.startswith("torch")), default=None)
    rest = {
        side: t for side, t in medians.items() if not side.startswith(("fusedopt", "torch", "ceil"))
    }
    fields = [f"{row['case'][:50]:50s}"]
    fields += [f"{t:9.3f}" if t is not None else f"{'-':>9s}" for t in (ours, torchs)]
    fields.append(f"{torchs / ours:6.2f}" if ours and torchs else f"{'-':>6s}")
    ceiling = medians.get("ceiling")
    fields.append(f"{100 * ceiling / ours:7.1f}%" if ours and ceiling else f"{'-':>8s}")
    if rest:
        best = min(rest, key=lambda side: rest[side])
        fields.append(f" {best} {rest[best]:.3f}")
    return " ".join(fields)


def output_of(command: list[str]) -> str:
    try:
        return subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def new_report(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    report: dict[str, Any] = {
        "dry_run": options.dry_run,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": options.commit or output_of(["git", "describe", "--always", "--dirty"])
        or "unknown",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda_of_torch": torch.version.cuda,
            "nvcc": output_of([first_of(["nvcc"]) or "nvcc", "--version"])[-80:],
        },
        "host": platform.platform(),
        "stages": {},
    }  # fmt: skip
    if not options.dry_run:
        properties = torch.cuda.get_device_properties(0)
        report["hardware"] = {
            "name": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "devices": torch.cuda.device_count(),
            "nvidia_smi": output_of([
                "nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,clocks.mem,power.draw",
                "--format=csv"]),
        }  # fmt: skip
    return report


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--stage", action="append", choices=list(STAGES), help="only these")
    parser.add_argument("--case", help="only cases with this in their title")
    parser.add_argument("--seconds", type=float, default=560, help="for everything")
    parser.add_argument("--test-seconds", type=float, default=120, help="for the test suite")
    parser.add_argument("--case-seconds", type=float, default=1.5, help="for the samples of a case")
    parser.add_argument("--commit", help="what is measured, where git can't tell")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, to try this program")
    options = parser.parse_args(arguments)
    import torch

    if not options.dry_run and not torch.cuda.is_available():
        sys.exit("torch finds no CUDA device, and nothing can be measured (see --dry-run)")
    if options.dry_run and options.output == parser.get_default("output"):
        sys.exit("--dry-run needs an --output of its own: it measures nothing")
    torch.manual_seed(0)
    run = Run(options, new_report(options))
    wanted = options.stage or list(STAGES)
    run_stages(run, {name: stage for name, stage in STAGES.items() if name in wanted})
    path = save(run)
    print("\n" + "\n".join(table(run.report)))
    print(f"{path}, {time.perf_counter() - run.started:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
