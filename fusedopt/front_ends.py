"""Which front ends can be used here beside torch's, and why one can't. It imports none of them."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from importlib.util import find_spec

import fusedopt
from fusedopt.core import extension


def report_without_torch() -> int:
    """Prints what there is. Returns the exit status: 1 if nothing compiled runs."""
    print(f"fusedopt {fusedopt.__version__}, without torch, Python {platform.python_version()}")
    print("torch's classes can't be used: torch isn't installed")
    for name, text in describe().items():
        print(f"{name}: {text}")
    return 1 if _missing_library("kernels") else 0


def describe() -> dict[str, str]:
    """A line for each front end, by the name of its module."""
    return {
        "fusedopt.arrays": _describe_arrays(),
        "fusedopt.jax": _describe_jax(),
        "fusedopt.keras": _describe_keras(),
    }


def _describe_arrays() -> str:
    if find_spec("numpy") is None:
        return "can't be used: NumPy isn't installed"
    missing = _missing_library("kernels")
    return f"can't be used: {missing}" if missing else f"for NumPy {metadata.version('numpy')}"


def _describe_jax() -> str:
    for package in ("jax", "optax"):
        if find_spec(package) is None:
            return f"can't be used: {package} isn't installed (pip install 'jax>=0.10' optax)"
    if missing := _missing_library("jax"):
        return f"can't be used: {missing}. It is compiled where JAX is installed before fusedopt"
    return f"for JAX {metadata.version('jax')}, on the CPU"


def _describe_keras() -> str:
    try:
        version = metadata.version("keras")
    except metadata.PackageNotFoundError:
        return "can't be used: Keras isn't installed (pip install 'keras>=3.15')"
    if find_spec("torch") is None:
        return "can't be used: it works on torch so far, which isn't installed"
    chosen = os.environ.get("KERAS_BACKEND")
    if chosen not in (None, "torch"):
        return f"can't be used: KERAS_BACKEND is {chosen}, and it works on torch so far"
    return f"for Keras {version}, with KERAS_BACKEND=torch"


def _missing_library(name: str) -> str | None:
    try:
        extension.find_library(name)
    except ImportError as error:
        return str(error)
    return None
