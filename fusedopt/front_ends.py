"""Which front ends can be used here beside torch's, and why one can't. It imports none of them."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from importlib.util import find_spec

import fusedopt
from fusedopt.core import extension, tensorflow_op


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
    if reason := _why_not_jax():
        return f"can't be used: {reason}"
    return f"for JAX {metadata.version('jax')}, on the CPU"


def _describe_keras() -> str:
    version = _version("keras")
    if version is None:
        return "can't be used: Keras isn't installed (pip install 'keras>=3.15')"
    reasons = {name: why_not() for name, why_not in KERAS_BACKENDS.items()}
    chosen, usable = os.environ.get("KERAS_BACKEND"), [it for it in reasons if not reasons[it]]
    if chosen is not None and chosen not in usable:
        works = f"it works on {', '.join(reasons)}"
        return f"can't be used: KERAS_BACKEND is {chosen}, and {reasons.get(chosen) or works}"
    if not usable:
        return f"can't be used: {', and '.join(filter(None, reasons.values()))}"
    return f"for Keras {version}, with KERAS_BACKEND={' or '.join(usable)}"


def _why_not_torch() -> str | None:
    return None if find_spec("torch") else "torch isn't installed"


def _why_not_jax() -> str | None:
    if find_spec("jax") is None:
        return "JAX isn't installed"
    missing = _missing_library("jax")
    return f"{missing}. It is compiled where JAX is installed before fusedopt" if missing else None


def _why_not_tensorflow() -> str | None:
    version = _version("tensorflow") or _version("tensorflow-cpu")
    if version is None or find_spec("tensorflow") is None:
        return "TensorFlow isn't installed"
    return tensorflow_op.why_not(version)


# Keras's backends that fusedopt.keras works on, and why one can't be used here.
KERAS_BACKENDS = {
    "jax": _why_not_jax,
    "tensorflow": _why_not_tensorflow,
    "torch": _why_not_torch,
}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _missing_library(name: str) -> str | None:
    try:
        extension.find_library(name)
    except ImportError as error:
        return str(error)
    return None
