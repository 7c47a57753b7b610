"""Where systems differ from Linux: fusedopt imports and trains without POSIX and without kernels.

A process of its own has torch of Linux, and then loses what Windows or macOS lack. This shows what
our own files need of the system; it shows nothing of torch there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
from test_build import ROOT, setup

MODULES = "fcntl grp posix pwd pty resource syslog termios tty".split()
# Of `os` and `signal`, without the ones that torch or Python's own files still ask for on Linux.
NAMES = """
os.O_CLOEXEC os.O_DIRECTORY os.O_NOFOLLOW os.chown os.fork os.forkpty os.getegid os.geteuid
os.getgid os.getloadavg os.getuid os.killpg os.mkfifo os.nice os.posix_spawn os.pread os.pwrite
os.register_at_fork os.sched_getaffinity os.sched_setaffinity os.setsid os.statvfs os.sysconf
os.uname os.wait signal.SIGALRM signal.SIGHUP signal.SIGKILL signal.SIGUSR1 signal.setitimer
""".split()
LACKS = {"win32": (MODULES, NAMES), "darwin": ([], ["os.sched_getaffinity", "os.O_TMPFILE"])}

TRAINS = """
import importlib, multiprocessing, pathlib, sys, warnings
import torch, torch.distributed.tensor, torch.optim.swa_utils, rich.console, matplotlib.figure
lacking, platform, log = sys.argv[1].split(), sys.argv[2], sys.argv[3]
for name in lacking:
    module, _, attribute = name.partition(".")
    if attribute:
        delattr(importlib.import_module(module), attribute)
    else:
        sys.modules[module] = None
sys.platform = platform
read = pathlib.Path.read_text
def read_text(path, *rest, **options):
    if str(path).startswith(("/proc", "/sys", "/dev")):
        raise FileNotFoundError(path)
    return read(path, *rest, **options)
pathlib.Path.read_text = read_text
warnings.filterwarnings("error")
warnings.filterwarnings("error", category=EncodingWarning)
warnings.filterwarnings("ignore", category=EncodingWarning, module="torch|matplotlib")
warnings.filterwarnings("ignore", "fusedopt runs on")

import fusedopt
from fusedopt.__main__ import main
from fusedopt.core.optimizer import FusedOptimizer
from fusedopt.monitoring.log_writer import LogWriter

classes = [getattr(fusedopt, name) for name in fusedopt.__all__ if name.startswith("Fused")]
for cls in [it for it in classes if it is not FusedOptimizer]:
    model = torch.nn.Linear(8, 4)
    params = [model.weight] if cls is fusedopt.FusedMuon else model.parameters()
    optimizer = cls(params, max_grad_norm=1.0)
    before = model.weight.detach().clone()
    for _ in range(3):
        model(torch.ones(2, 8)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(model.weight, before), cls
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()

model = torch.nn.Linear(8, 4)
optimizer = fusedopt.FusedAdamW(model.named_parameters(), telemetry=100)
with fusedopt.Monitor(optimizer, log) as monitor:
    for _ in range(20):
        model(torch.randn(2, 8)).square().sum().backward()
        optimizer.step()
assert main(["plot", log, "--output", log + ".png"]) == 0
assert main(["watch", log, "--once"]) == 0
assert fusedopt.clip_grad_norm_(model.parameters(), 1.0) > 0
assert main([]) == 1
print("all steps taken")
"""


@pytest.fixture
def package(tmp_path):
    """A folder with the package as it installs where nothing is compiled."""
    built = shutil.ignore_patterns("*.so", "__pycache__", "_build.json")
    shutil.copytree(ROOT / "fusedopt", tmp_path / "installed/fusedopt", ignore=built)
    return tmp_path / "installed"


@pytest.mark.parametrize("platform", LACKS)
def test_fusedopt_trains_without_what_the_system_lacks(package, tmp_path, platform):
    modules, names = LACKS[platform]
    lacking = " ".join([*modules, *names])
    log = str(tmp_path / "log.jsonl")
    done = subprocess.run(
        [sys.executable, "-X", "warn_default_encoding", "-c", TRAINS, lacking, platform, log],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(package), "CXX": "no-compiler"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Python files: {package / 'fusedopt'}" in done.stdout
    assert done.stdout.endswith("all steps taken\n")


def test_windows_installs_without_compiled_kernels(monkeypatch):
    monkeypatch.setattr(setup.sys, "platform", "win32")
    assert "ext_modules" not in setup.build_options()
    assert setup.why_pure_python() == "no build for Windows exists yet"
