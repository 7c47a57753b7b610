"""Backends under test: "cpu", "emulated" (the CUDA sources on the CPU), "cuda" (a real GPU)."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import fusedopt
from fusedopt.core import backends

EMULATOR = Path(__file__).parent / "emulator"
sys.path.insert(0, str(EMULATOR))

# The emulated kernels alone, with AddressSanitizer and UBSan ("sanitized") or with ThreadSanitizer
# ("racecheck") in them.
SANITIZED = os.environ.get("FUSEDOPT_TEST_SANITIZED")


@dataclass(frozen=True)
class BackendUnderTest:
    name: str
    device: str

    def make(self, cls: Callable[..., Any], params: Any, **kwargs: Any) -> Any:
        return cls(params, backend="cpu" if self.name == "cpu" else "cuda", **kwargs)


@pytest.fixture(params=["emulated"] if SANITIZED else ["cpu", "emulated", "cuda"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> BackendUnderTest:
    return under_test(request.param, monkeypatch)


def under_test(name: str, monkeypatch: pytest.MonkeyPatch) -> BackendUnderTest:
    if name == "cuda":
        reason = backends.why_missing("cuda")
        if reason is not None:
            pytest.skip(f"no CUDA here: {reason}")
        return BackendUnderTest("cuda", "cuda")
    if name == "emulated":
        monkeypatch.setattr(backends, "_C", emulated())
    elif backends.why_missing("cpu") is not None:
        pytest.fail(f"the extension is to be tested, but {backends.why_missing('cpu')}")
    return BackendUnderTest(name, "cpu")


_emulated: Any = None


def emulated() -> Any:
    global _emulated
    if _emulated is None:
        import build

        _emulated = build.load(SANITIZED or "emulated")
    return _emulated


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """Tests run in several processes at once, but a step is to meet a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if SANITIZED == "racecheck" else 2)  # it doesn't understand OpenMP
    yield
    torch.set_num_threads(before)


def pytest_report_header() -> str:
    built = {name: backends.why_missing(name) or "yes" for name in ("cpu", "cuda")}
    return f"fusedopt {fusedopt.__version__}: {built}"


@pytest.fixture
def one_thread():
    """Threads on a busy machine wait for each other longer than they compute here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def same_environment():
    """Trainers pass settings on in variables: the bf16 of one would be the default of the next."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
