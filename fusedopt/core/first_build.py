"""Compiles the binding for a torch that the package was not built for, at the first import.

The kernels' library knows no torch. Only the binding to it, `fusedopt._C`, fits one minor version
of torch. An installed package has the binding's sources beside it, so that torch can be upgraded
under it. The same holds for TensorFlow and its op.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from fusedopt.core.extension import library_in

SWITCH = "FUSEDOPT_BUILD_BINDING"


class Product(NamedTuple):
    """What is compiled.

    Attributes:
        name: of the file.
        script: makes it, in csrc.
        words: for messages.
        framework: the library that it fits one version of.
        binds_python: whether ninja and Python's headers are needed.
    """

    name: str
    script: str
    words: str
    framework: str
    binds_python: bool


BINDING = Product("_C.so", "build_binding.py", "the binding", "torch", True)
OP = Product("libfusedopt_tensorflow.so", "build_op.py", "the op", "TensorFlow", False)


def compiled(package: Path, version: str, product: Product = BINDING) -> Path:
    """The product for this Python and this version of its framework, from the cache or compiled.

    Processes that need the same one at the same time wait for the one that compiles it.

    Raises:
        ImportError: nothing can be compiled here; the message says why.
    """
    library, why = library_in(package), why_not(package, product)
    if library is None or why is not None:
        raise ImportError(why)
    folder = _cache() / _key(package, library, f"{product.framework.lower()}{version}")
    made = folder / product.name
    with _alone(folder):
        if not made.is_file():
            _compile(package / "csrc", library, folder, version, product)
    return made


def why_not(package: Path, product: Product) -> str | None:
    """Why nothing can be compiled for this package, if so."""
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH}=0 forbids to compile {product.words} for it"
    if library_in(package) is None or not (package / "csrc" / product.script).is_file():
        return f"the package lacks the sources to compile {product.words} for it"
    return None


def _cache() -> Path:
    if folder := os.environ.get("TORCH_EXTENSIONS_DIR"):  # torch's own choice for such files
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fusedopt"


def _key(package: Path, library: Path, framework: str) -> str:
    """A name for all that a product depends on."""
    made = library.stat()
    parts = [sys.implementation.cache_tag, framework, package, made.st_mtime_ns, made.st_size]
    digest = hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()
    return f"fusedopt_{sys.implementation.cache_tag}_{framework}_{digest[:12]}"


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keeps other processes out. The lock ends with its process, however that ends."""
    try:
        import fcntl
    except ImportError:
        raise ImportError("nothing can be compiled on this system") from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock: IO[bytes] = (folder / "fusedopt.lock").open("wb")
    except OSError as error:
        raise ImportError(f"{error}; set TORCH_EXTENSIONS_DIR to a folder of yours") from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _compile(csrc: Path, library: Path, folder: Path, version: str, product: Product) -> None:
    environment = _environment()
    if why := _what_is_missing(csrc, product, environment["PATH"]):
        raise ImportError(f"{product.words} for it can't be compiled here: {why.rstrip('.')}")
    what = f"{product.words} for {product.framework} {version}"
    _say(f"compiling {what}, once; this takes about a minute")
    started = time.monotonic()
    scratch = folder / "build"
    scratch.mkdir(exist_ok=True)
    (scratch / "lock").unlink(missing_ok=True)  # torch's own, of a process that was killed
    command = [sys.executable, str(csrc / product.script), str(scratch), str(library)]
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    log = folder / "build.log"
    log.write_text(done.stdout + done.stderr, encoding="utf-8")
    if done.returncode != 0:
        last = (done.stderr.strip() or "nothing was printed").splitlines()[-1]
        raise ImportError(f"{product.words} for it can't be compiled here: {last} (see {log})")
    os.replace(scratch / product.name, folder / product.name)
    _say(f"compiled in {time.monotonic() - started:.0f} s, and kept in {folder}")


def _environment() -> dict[str, str]:
    """A process finds this one's modules, and ninja even in a virtual environment not activated."""
    path = [os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")]
    modules = os.pathsep.join(filter(None, sys.path))
    return {**os.environ, "PATH": os.pathsep.join(path), "PYTHONPATH": modules}


def _what_is_missing(csrc: Path, product: Product, path: str) -> str | None:
    if product.binds_python and shutil.which("ninja", path=path) is None:
        return "there is no ninja: `pip install ninja`"
    toolchain = runpy.run_path(str(csrc / "toolchain.py"))
    return toolchain["why_not_compile"](product.binds_python)


def _say(text: str) -> None:
    print(f"fusedopt: {text}", file=sys.stderr, flush=True)
