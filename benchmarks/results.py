"""Result files: raw samples with hardware, versions, date and commit; their medians and ratios."""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import fusedopt

FOLDER = Path(__file__).parent / "results"
MAX_SAMPLES = 60  # per row: more would say little more, and make the files large
LIBRARIES = (
    "torch apex deepspeed bitsandbytes torch-optimi torchao flashoptim jax optax keras"
    " tensorflow tensorflow-cpu"
).split()

Row = dict[str, Any]


def hardware(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    found = {"fusedopt": fusedopt.__version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def new_report(device: str) -> dict[str, Any]:
    now = datetime.datetime.now(datetime.timezone.utc)
    return {
        "hardware": hardware(device),
        "device": device,
        "date": now.isoformat(timespec="seconds"),
        "commit": subprocess.getoutput("git describe --always --dirty"),
        "versions": versions(),
        "rows": [],
    }


def save(report: dict[str, Any], suites: Iterable[str], folder: Path = FOLDER) -> Path:
    """Writes a report: one row per line, samples in nanoseconds. Returns the path."""
    folder.mkdir(parents=True, exist_ok=True)
    name = "_".join([*sorted(suites), report["device"], report["date"][:10]])
    path = folder / f"{name}.json"
    head = {key: value for key, value in report.items() if key != "rows"}
    rows = ",\n".join("  " + json.dumps(row) for row in report["rows"])
    path.write_text(json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n{rows}\n ]\n}}\n')
    return path


def load_all(folder: Path = FOLDER) -> list[dict[str, Any]]:
    """Reads all reports; the newest is the last."""
    reports = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    return sorted(reports, key=lambda report: report["date"])


def kept(samples: list[float]) -> list[int]:
    """The nanoseconds of at most `MAX_SAMPLES` rounds, evenly spread; the same for all sides."""
    stride = -(-len(samples) // MAX_SAMPLES)
    return [round(sample * 1e9) for sample in samples[::stride]]


def median_seconds(row: Row) -> float:
    return statistics.median(row["samples_ns"]) / 1e9


def ratio(row: Row, base: Row) -> tuple[float, float, float]:
    """The quartiles, over the rounds, of the row's time divided by `base`'s time in the same round.

    The samples of a round are close in time: a slow moment of the machine slows both.
    """
    pairs = zip(row["samples_ns"], base["samples_ns"], strict=True)
    ratios = [theirs / ours for theirs, ours in pairs]
    if len(ratios) == 1:
        return ratios[0], ratios[0], ratios[0]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return low, middle, high
