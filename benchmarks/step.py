"""The step against torch.optim's, both in one run.

    python benchmarks/step.py [--device cuda] [--threads 2] [--save]

Every case alternates the two sides, step by step, after a warm-up, on random data, and compares the
medians. --save writes the raw samples with the hardware, versions, date and commit to
benchmarks/results/. Times from a shared machine vary; the ratios are what to look at.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import Parameter
from tqdm import tqdm

import fusedopt

RESULTS = Path(__file__).parent / "results"
Step = Callable[[], object]


@dataclass(frozen=True)
class Case:
    name: str
    shapes: list[tuple[int, ...]]
    cls: type
    twin: type
    twin_kwargs: dict[str, bool]
    clip: bool = True
    dtype: torch.dtype = torch.float32


ADAMW = {"cls": fusedopt.FusedAdamW, "twin": torch.optim.AdamW, "twin_kwargs": {"fused": True}}
RMSPROP = {"cls": fusedopt.FusedRMSprop, "twin": torch.optim.RMSprop}
LARGE = [(25_000_000,)]
CASES = [
    Case("AdamW, one tensor of 25M, clipped", LARGE, **ADAMW),
    Case("AdamW, one tensor of 25M", LARGE, **ADAMW, clip=False),
    Case("AdamW, bfloat16, one tensor of 25M, clipped", LARGE, **ADAMW, dtype=torch.bfloat16),
    Case("AdamW, 1,000 tensors of 64, clipped", [(64,)] * 1000, **ADAMW),
    Case("AdamW, 1,000 tensors of 64", [(64,)] * 1000, **ADAMW, clip=False),
    Case("AdamW, 300 tensors of 4,096, clipped", [(4096,)] * 300, **ADAMW),
    Case("RMSprop, 25M, clipped (torch: foreach)", LARGE, **RMSPROP, twin_kwargs={"foreach": True}),
    Case("RMSprop, 25M, clipped (torch: loop)", LARGE, **RMSPROP, twin_kwargs={"foreach": False}),
]


def make_params(case: Case, device: str) -> list[Parameter]:
    params = [Parameter(torch.randn(s, device=device).to(case.dtype)) for s in case.shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    return params


def make_steps(case: Case, device: str) -> tuple[Step, Step]:
    """Our step, and torch's: with clipping, both do what `clip_grad_norm_` and `step` do."""
    fused = case.cls(make_params(case, device), max_grad_norm=1.0 if case.clip else None)
    twin_params = make_params(case, device)
    twin = case.twin(twin_params, **case.twin_kwargs)

    def clipped_twin_step() -> None:
        torch.nn.utils.clip_grad_norm_(twin_params, 1.0)
        twin.step()

    return fused.step, clipped_twin_step if case.clip else twin.step


def timed(step: Step, device: str) -> float:
    """Seconds that one step takes: on the host's clock, or between two events on the device."""
    if device == "cpu":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    step()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


def measure(case: Case, device: str, seconds: float) -> dict[str, list[float]]:
    """Samples of both sides in turn, for about that long."""
    steps = dict(zip(("fusedopt", "torch"), make_steps(case, device), strict=True))
    for _ in range(5):
        for step in steps.values():
            step()
    samples: dict[str, list[float]] = {side: [] for side in steps}
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or len(samples["torch"]) < 15:
        for side, step in steps.items():
            samples[side].append(timed(step, device))
    return samples


def hardware(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model}, {torch.get_num_threads()} threads"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--seconds", type=float, default=4.0, help="per case (default: %(default)s)"
    )
    parser.add_argument(
        "--save", action="store_true", help="write the samples to benchmarks/results"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    rows = []
    for case in tqdm(CASES, leave=False):
        samples = measure(case, options.device, options.seconds)
        ours, theirs = (statistics.median(samples[side]) for side in ("fusedopt", "torch"))
        rows.append({"case": case.name, "ratio": theirs / ours, "samples": samples})
        tqdm.write(
            f"{case.name:45s} fusedopt {ours * 1e3:9.3f} ms   torch {theirs * 1e3:9.3f} ms   "
            f"{theirs / ours:6.2f}x"
        )
    report = {
        "hardware": hardware(options.device),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": subprocess.getoutput("git rev-parse --short HEAD"),
        "versions": {
            "fusedopt": fusedopt.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "rows": rows,
    }
    print(f"{report['hardware']}, torch {torch.__version__}, commit {report['commit']}")
    if options.save:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"step_{options.device}_{report['date'][:10]}.json"
        path.write_text(json.dumps(report, indent=1) + "\n")
        print(f"samples: {path}")


if __name__ == "__main__":
    main()
