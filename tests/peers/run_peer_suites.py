"""Runs other libraries' tests of optimizers with fusedopt's classes in place of torch.optim's.

    python tests/peers/run_peer_suites.py            # all of them
    python tests/peers/run_peer_suites.py timm       # one

By hand, before a release: it installs the libraries into a virtual environment of its own (in
build/peers), which takes the torch that runs, and downloads their source distributions, whose tests
it runs twice: with torch's classes and with ours. It prints how many tests passed with ours, and
those that fail with ours only, the known differences apart. Exit status 1: there are such.
"""

from __future__ import annotations

import argparse
import os
import re
import site
import subprocess
import sys
import tarfile
import venv
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


@dataclass(frozen=True)
class Peer:
    """A library, the tests to run, and what to install beside it.

    Attributes:
        plugin: the pytest plugin that puts fusedopt's classes in the place of others.
        known: patterns of tests that fail with fusedopt's classes, as "name: error", and why they
            may.
    """

    tests: tuple[str, ...]
    needs: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    plugin: str = "fused_classes"
    known: dict[str, str] = field(default_factory=dict)


# In timm's list of optimizers these are torch.optim's.
TIMM = " or ".join(
    f"[{name}]" for name in ("adam", "adamw", "nadam", "nadamw", "rmsprop", "sgd", "momentum")
)

PEERS = {
    "accelerate": Peer(
        ("tests/test_optimizer.py", "tests/test_scheduler.py", "tests/test_state_checkpointing.py"),
        needs=("parameterized",),
    ),
    "optax": Peer(
        (
            *(f"optax/_src/{it}_test.py" for it in ("alias", "combine")),
            *(f"optax/transforms/_{it}_test.py" for it in ("conditionality", "masking")),
            "-k",
            "not LBFGS and not Linesearch",
        ),
        needs=("jax", "absl-py", "scikit-learn"),
        plugin="fused_optax",
        known={
            "TypeError: params.* is (complex|int)": "the kernels have no such numbers",
            "Invalid (mu|accumulator)_dtype value": "moments have the parameter's dtype",
            "explicit_dtype.*NoneType|map_params|state_structure": "moments lie flat, by dtype",
        },
    ),
    "pytorch-ignite": Peer(
        (
            "tests/ignite/handlers/test_param_scheduler.py",
            "tests/ignite/handlers/test_lr_finder.py",
            "tests/ignite/handlers/test_checkpoint.py",
            "tests/ignite/engine/test_create_supervised.py",
            "-m",
            "not distributed and not tpu",
        ),
        needs=("pytest-mock", "matplotlib", "torchvision"),
    ),
    "pytorch_optimizer": Peer(
        ("tests/test_wrapper_optimizers.py", "tests/test_lr_schedulers.py"),
    ),
    "timm": Peer(
        ("tests/test_optim.py", "-k", TIMM),
        needs=("torchvision",),
        environment={"TORCH_DEVICE": "cpu"},
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("peers", nargs="*", metavar="PEER", help=f"of {', '.join(PEERS)}")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "peers")
    parser.add_argument("--timeout", type=int, default=1800, help="seconds for one run of a suite")
    args = parser.parse_args(arguments)
    unknown = set(args.peers) - set(PEERS)
    if unknown:
        parser.error(f"no such peer: {', '.join(sorted(unknown))}; expected {', '.join(PEERS)}")
    python = environment(args.folder)
    failures = 0
    for name in args.peers or PEERS:
        failures += compare(name, PEERS[name], args.folder, python, args.timeout)
    return 1 if failures else 0


def environment(folder: Path) -> Path:
    """A virtual environment that sees the packages of this one; returns its python."""
    python = folder / "venv" / "bin" / "python"
    if not python.exists():
        venv.create(folder / "venv", with_pip=True)
        code = "import site; print(site.getsitepackages()[0])"
        packages = subprocess.check_output([python, "-c", code], text=True).strip()
        (Path(packages) / "outer.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return python


def compare(name: str, peer: Peer, folder: Path, python: Path, timeout: int) -> int:
    """Prints what differs; returns the number of tests that fail with our classes only."""
    pip = [python, "-m", "pip", "--disable-pip-version-check", "-q"]
    release = torch.__version__.split("+")[0]
    subprocess.run([*pip, "install", f"torch=={release}", name, *peer.needs], check=True)
    source = download(name, folder, pip)
    torchs = run_suite(peer, source, python, folder / f"{name}-torch.xml", False, timeout)
    ours = run_suite(peer, source, python, folder / f"{name}-fusedopt.xml", True, timeout)
    failed = {test: text for test, text in ours.items() if text is not None}
    only_ours = {test: text for test, text in failed.items() if torchs.get(test, "") is None}
    known = {
        test: why
        for test, text in only_ours.items()
        for pattern, why in peer.known.items()
        if re.search(pattern, f"{test}: {text}")
    }
    print(
        f"{source.name}: {len(ours) - len(failed)} passed, {len(only_ours) - len(known)} failed, "
        f"{len(known)} known differences; {len(failed) - len(only_ours)} fail with torch's "
        "classes, too",
        flush=True,
    )
    for test, why in known.items():
        print(f"  known: {test}: {why}")
    new = {test: text for test, text in only_ours.items() if test not in known}
    for test, text in new.items():
        print(f"  FAILED {test}: {text}")
    ran = len(ours) > len(failed)
    if not ran:
        print(f"  FAILED: no test passed; the first error: {next(iter(failed.values()), None)}")
    return len(new) + (not ran)


def download(name: str, folder: Path, pip: list[str | Path]) -> Path:
    """The unpacked source distribution."""
    sources = folder / "sources"
    options = ["--no-binary", ":all:", "--no-deps", "--dest", sources]
    subprocess.run([*pip, "download", *options, name], check=True)
    normal = name.replace("-", "_").lower()
    archives = sources.glob("*.tar.gz")
    archive = max(
        (it for it in archives if it.name.replace("-", "_").lower().startswith(normal)),
        key=lambda it: it.stat().st_mtime,
    )
    with tarfile.open(archive) as file:
        file.extractall(sources, filter="data")
    return sources / archive.name.removesuffix(".tar.gz")


def run_suite(
    peer: Peer, source: Path, python: Path, report: Path, fused: bool, timeout: int
) -> dict[str, str | None]:
    """The tests by name; None: it passed, else the first line of its failure. No skipped ones."""
    report.unlink(missing_ok=True)
    paths = [str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    # Neither their options, as for coverage, nor those of the project around the folder.
    command += ["-c", os.devnull, "--rootdir", str(source)]
    command += ["-p", peer.plugin] if fused else []
    try:
        subprocess.run(
            [*command, *peer.tests],
            cwd=source,
            env={**variables, **peer.environment},
            timeout=timeout,
            stdout=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        print(f"{source.name}: not done in {timeout} seconds", flush=True)
    results: dict[str, str | None] = {}
    if not report.exists():  # pytest came to no test
        return results
    for case in ElementTree.parse(report).iter("testcase"):
        if case.find("skipped") is not None:
            continue
        problem = case.find("failure")
        problem = case.find("error") if problem is None else problem
        text = None if problem is None else describe(problem)
        results[f"{case.get('classname')}::{case.get('name')}"] = text
    return results


def describe(problem: ElementTree.Element) -> str:
    """The first line of the message; of an error outside of a test, the last line of its text."""
    message = (problem.get("message") or "").split("\n")[0]
    lines = (problem.text or "").strip().split("\n")
    return (lines[-1] if message == "collection failure" else message)[:200]


if __name__ == "__main__":
    sys.exit(main())
