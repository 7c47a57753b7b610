"""Tests, sanitizes and measures this project on a GPU, in one command.

    python benchmarks/gpu_report.py correctness   tests and sanitizers: at most 6 minutes
    python benchmarks/gpu_report.py figures       times and memory: at most 6 minutes

It builds the extension, runs the stages of gpu_stages.py one after another, prints tables, and
writes one JSON with the raw samples, hardware, versions and commit. If a stage fails, or has no
time left, the report says so and the other stages run. It needs torch, nvcc, ninja, pybind11,
pytest and a C++ compiler. The report names libraries for comparison that are missing.

Run correctness first: the times of wrong kernels mean nothing. Without a part it runs all stages.

--dry-run does the same on a CPU with small tensors. Its output is marked as a dry run: its times
mean nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import gpu_build  # noqa: E402

# The stages of each part. The figures that the README shows come first.
PARTS = {
    "correctness": ["tests", "sanitize"],
    "figures": ["copies", "speed", "host", "graphs", "memory", "variants"],
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("part", nargs="?", choices=PARTS, help="which stages; default: all")
    parser.add_argument("--stage", action="append", help="only these stages")
    parser.add_argument("--case", help="only cases with this in their title")
    parser.add_argument("--seconds", type=float, default=340, help="for everything")
    parser.add_argument("--test-seconds", type=float, default=240, help="for the test suite")
    parser.add_argument("--case-seconds", type=float, default=1.5, help="for the samples of a case")
    parser.add_argument("--commit", help="what is measured, where git can't tell")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, to try this program")
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        sys.exit("torch finds no CUDA device, and nothing can be measured (see --dry-run)")
    if options.dry_run and options.output == parser.get_default("output"):
        sys.exit("--dry-run needs an --output of its own: it measures nothing")
    torch.manual_seed(0)
    started = time.perf_counter()
    parts = [options.part] if options.part else list(PARTS)
    stages = options.stage or [stage for part in parts for stage in PARTS[part]]
    built = {} if options.dry_run else gpu_build.build(options.seconds, "variants" in stages)
    from benchmarks import gpu_stages  # import it after the build, as it loads the built modules

    run = gpu_stages.Run(options, gpu_stages.new_report(options), started)
    run.report["stages"]["build"] = built
    path = gpu_stages.run_stages(run, stages)
    print("\n" + "\n".join(gpu_stages.lines_of(run.report)))
    print(f"{path}, {time.perf_counter() - started:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
