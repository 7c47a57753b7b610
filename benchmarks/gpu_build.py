"""Builds the modules for gpu_report.py. It doesn't import fusedopt, which would load old ones."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent

# Builds with other options of nvcc, to measure the cost of our choices. They give other bits, and
# nothing else uses them.
VARIANTS = {
    "with FMA": "-fmad=true",
    "rough division and root": "-prec-div=false -prec-sqrt=false",
}


def build(limit: float, with_variants: bool) -> dict[str, Any]:
    """Builds the extension for this GPU, as shipped, and with other options if they are given.

    Raises:
        RuntimeError: it can't be built, or not within `limit` seconds.
    """
    major, minor = torch.cuda.get_device_capability()
    shared = {"FUSEDOPT_CUDA": "1", "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"}
    command = [sys.executable, "setup.py", "build_ext"]

    def build_variant(name: str) -> dict[str, Any]:
        folder = variant_folder(name)
        return call([*command, f"--build-lib={folder}", f"--build-temp={folder / 'temp'}"],
                    limit, **shared, NVCC_APPEND_FLAGS=VARIANTS[name],
                    FUSEDOPT_LIBRARY_SUFFIX=f"_{name.replace(' ', '_')}")  # fmt: skip

    with ThreadPoolExecutor() as pool:
        shipped = pool.submit(call, [*command, "--inplace"], limit, **shared)
        names = list(VARIANTS) if with_variants else []
        variants = dict(zip(names, pool.map(build_variant, names), strict=True))
    result = shipped.result()
    if result["status"] != 0:
        raise RuntimeError(f"the build failed: {result['output'][-2000:]}")
    result["variants"] = {name: it["status"] for name, it in variants.items()}
    result["resources"] = resources(ROOT.glob("build/temp*/cuda_*.log"))
    return result


def variant_folder(name: str) -> Path:
    return ROOT / "build/gpu_report" / name.replace(" ", "_")


def variant_library(name: str) -> Path:
    return variant_folder(name) / f"fusedopt/_C{sysconfig.get_config_var('EXT_SUFFIX')}"


def resources(reports: Iterable[Path]) -> list[dict[str, Any]]:
    """Registers and spills of each kernel, from nvcc's reports."""
    found = []
    for report in reports:
        for part in report.read_text().split("Compiling entry function ")[1:]:
            name = re.match(r"'(\S+)'", part)
            registers = re.search(r"Used (\d+) registers", part)
            spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
            if name is None or registers is None:
                continue
            found.append({
                "kernel": name[1],
                "registers": int(registers[1]),
                "spilled_bytes": sum(map(int, spills.groups())) if spills else 0,
            })  # fmt: skip
    return found


def call(command: list[Any], limit: float, **environment: str) -> dict[str, Any]:
    """Runs a program and its children for a limited time.

    Returns its status (None: too long) and the end of its output.
    """
    limit = max(1.0, limit)
    start = time.perf_counter()
    # In a session of its own, so that its children end with it and disturb no measurement.
    process = subprocess.Popen(
        list(map(str, command)), cwd=ROOT, env={**os.environ, **environment},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=limit)
        status = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        status = None
    except BaseException:  # a terminal's Ctrl-C doesn't reach that session
        os.killpg(process.pid, signal.SIGKILL)
        raise
    seconds = round(time.perf_counter() - start, 1)
    return {"status": status, "seconds": seconds, "output": output[-30_000:]}
