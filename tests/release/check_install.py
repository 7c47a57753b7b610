"""Installs a wheel or a source distribution as a user would, and checks what they would see.

    python tests/release/check_install.py dist/fusedopt-*.whl --torch 2.13.0 --then 2.14.1

A new environment gets this torch and the file. The self-check has to pass there, and a script to
train. Then another torch is installed over it: the self-check has to pass again. At last there is
no compiler: the script has to train on, with one warning.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import venv
from pathlib import Path

TRAINS = """
import torch, fusedopt
model = torch.nn.Linear(8, 4)
opt = fusedopt.FusedAdamW(model.parameters(), lr=1e-2, max_grad_norm=1.0)
inputs, losses = torch.randn(64, 8), []
for _ in range(20):
    loss = (model(inputs) - inputs[:, :4]).square().mean()
    losses.append(loss.item())
    opt.zero_grad()
    loss.backward()
    opt.step()
assert losses[-1] < losses[0], losses
print("trains", losses[0], "->", losses[-1])
"""


class Machine:
    """A new environment, a cache of its own, and an empty folder to run in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "venv/bin/python"
        self.variables = {
            **os.environ,
            "PATH": f"{self.python.parent}{os.pathsep}{os.environ['PATH']}",
            "TORCH_EXTENSIONS_DIR": str(folder / "cache"),
        }
        self.variables.pop("PYTHONPATH", None)
        (folder / "empty").mkdir()
        venv.create(folder / "venv", with_pip=True)

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        print("+ python", *(it if "\n" not in it else "(script)" for it in arguments), flush=True)
        done = subprocess.run(
            [str(self.python), *arguments],
            cwd=self.folder / "empty",
            env={**self.variables, **variables},
            capture_output=True,
            text=True,
        )
        print(done.stdout + done.stderr, flush=True)
        return done

    def install(self, *names: str) -> None:
        assert self.run("-m", "pip", "install", "--quiet", *names).returncode == 0

    def check(self, torch: str) -> None:
        """The self-check passes, and compiles the binding once if the package lacks it."""
        compiles = 0 if self.has_binding(torch) else 1
        for times in (compiles, 0):
            done = self.run("-m", "fusedopt")
            assert done.returncode == 0
            assert done.stderr.count("compiling the binding") == times, done.stderr
        done = self.run("-W", "error", "-c", TRAINS)
        assert done.returncode == 0 and "trains" in done.stdout

    def has_binding(self, torch: str) -> bool:
        """Whether the package itself has a binding for this torch."""
        (package,) = (self.folder / "venv").glob("lib/python*/site-packages/fusedopt")
        minor = ".".join(torch.split(".")[:2])
        built = json.loads((package / "_build.json").read_text())["torch"] or ""
        return built.startswith(f"{minor}.") or (package / f"bindings/torch{minor}").is_dir()

    def check_without_a_compiler(self) -> None:
        nothing = {"CXX": "false", "TORCH_EXTENSIONS_DIR": str(self.folder / "another cache")}
        done = self.run("-c", TRAINS, **nothing)
        assert done.returncode == 0 and done.stderr.count("Warning") == 1, done.stderr
        assert self.run("-m", "fusedopt", **nothing).returncode == 1


def check(path: Path, torch: str, then: list[str]) -> None:
    """Raises AssertionError where something isn't as it should be."""
    with tempfile.TemporaryDirectory() as folder:
        machine = Machine(Path(folder))
        machine.install(f"torch=={torch}", "setuptools>=77", "ninja", "numpy")
        machine.install("--no-build-isolation", "--no-deps", str(path))
        machine.check(torch)
        for other in then:
            machine.install(f"torch=={other}")
            machine.check(other)
        if then and not machine.has_binding(then[-1]):
            machine.check_without_a_compiler()
    print("all as it should be")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, help="a wheel or a source distribution")
    parser.add_argument("--torch", default="2.13.0", help="the version to install first")
    parser.add_argument("--then", nargs="*", default=[], help="versions to install over it")
    arguments = parser.parse_args()
    check(arguments.path.resolve(), arguments.torch, arguments.then)
