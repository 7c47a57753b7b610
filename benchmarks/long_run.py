"""A run of a million small steps under a Monitor, to see if memory grows and the log can be read.

    python benchmarks/long_run.py [--steps 1000000] [--log run.jsonl]

It trains a network of two layers with FusedAdamW; some gradients are infinite. It prints the memory
of the process at twenty points of the run. Then it prints the time and memory for reading the log
with `fusedopt.read_log`, and for drawing it with `python -m fusedopt plot`, each in a process of
its own. It needs Linux, and 350 bytes of disk per step.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

import fusedopt

LOOKS = 20  # how often the memory is printed
EXPLODES = 10_000  # every so many steps a gradient is infinite
READ = """
import sys, fusedopt
log = fusedopt.read_log(sys.argv[1])
assert log.damage is None, log.damage
assert log.telemetry.step.tolist() == list(range(1, int(sys.argv[2]) + 1))
print(f"{len(log.telemetry.step):,} steps, {int(log.telemetry.skipped.sum())} of them skipped")
"""
PLOT = """
import sys
from fusedopt.monitoring import plot
assert plot.main([sys.argv[1], "-o", sys.argv[3]]) == 0
"""
PEAK = """
import re
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--log", type=Path, help="default: a temporary file")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        log = options.log or Path(folder) / "run.jsonl"
        train(log, options.steps)
        print(f"log: {log.stat().st_size / 1e6:,.1f} MB")
        for title, program in (("read_log", READ), ("plot", PLOT)):
            run(title, program, [log, options.steps, log.with_suffix(".png")])


def train(log: Path, steps: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    inputs, targets = torch.randn(64, 8).split(8), torch.randn(64, 4).split(8)
    opt = fusedopt.FusedAdamW(
        model.named_parameters(), lr=1e-3, max_grad_norm=1.0, telemetry=100, backend="cpu"
    )
    started = time.perf_counter()
    with fusedopt.Monitor(opt, log):
        for step in range(1, steps + 1):
            loss = nn.functional.mse_loss(model(inputs[step % 8]), targets[step % 8])
            (loss * math.inf if step % EXPLODES == 0 else loss).backward()
            opt.step()
            opt.zero_grad()
            if step % max(1, steps // LOOKS) == 0:
                seconds = time.perf_counter() - started
                megabytes = resident_bytes() / 1e6
                print(f"step {step:9,}: {megabytes:7.1f} MB, {seconds:6.1f} s", flush=True)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def run(title: str, program: str, arguments: Sequence[object]) -> None:
    """Runs a program; prints its output, its time, and its peak memory."""
    started = time.perf_counter()
    command = [sys.executable, "-c", program + PEAK, *map(str, arguments)]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    *words, kilobytes = printed.split("\n")[:-1]
    seconds = time.perf_counter() - started
    print(f"{title}: {' '.join(words)}; {seconds:.1f} s, at most {int(kilobytes) / 1e3:,.0f} MB")


if __name__ == "__main__":
    main()
