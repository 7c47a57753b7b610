"""Compiles the binding for a torch that the package was not built for, at the first import.

The kernels' library knows no torch. Only the binding to it, `fusedopt._C`, fits one minor version
of torch. An installed package has the binding's sources beside it, so that torch can be upgraded
under it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from fusedopt.core.extension import library_in

SWITCH = "FUSEDOPT_BUILD_BINDING"


def compiled(package: Path, torch_version: str) -> Path:
    """The binding for this Python and this torch, from the cache or newly compiled.

    Processes that need the same binding at the same time wait for the one that compiles it.

    Raises:
        ImportError: nothing can be compiled here; the message says why.
    """
    csrc, library = package / "csrc", library_in(package)
    if os.environ.get(SWITCH) == "0":
        raise ImportError(f"{SWITCH}=0 forbids to compile the binding for it")
    if library is None or not (csrc / "build_binding.py").is_file():
        raise ImportError("the package lacks the sources to compile the binding for it")
    folder = _cache() / _key(package, library, torch_version)
    binding = folder / "_C.so"
    with _alone(folder):
        if not binding.is_file():
            _compile(csrc, library, folder, torch_version)
    return binding


def _cache() -> Path:
    if folder := os.environ.get("TORCH_EXTENSIONS_DIR"):  # torch's own choice for such files
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fusedopt"


def _key(package: Path, library: Path, torch_version: str) -> str:
    """A name for all that a binding depends on."""
    made = library.stat()
    parts = [sys.implementation.cache_tag, torch_version, package, made.st_mtime_ns, made.st_size]
    digest = hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()
    return f"fusedopt_{sys.implementation.cache_tag}_torch{torch_version}_{digest[:12]}"


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keeps other processes out. The lock ends with its process, however that ends."""
    try:
        import fcntl
    except ImportError:
        raise ImportError("nothing can be compiled on this system") from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock: IO[str] = (folder / "fusedopt.lock").open("w")
    except OSError as error:
        raise ImportError(f"{error}; set TORCH_EXTENSIONS_DIR to a folder of yours") from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _compile(csrc: Path, library: Path, folder: Path, torch_version: str) -> None:
    _say(f"compiling the binding for torch {torch_version}, once; this takes about a minute")
    started = time.monotonic()
    scratch = folder / "build"
    scratch.mkdir(exist_ok=True)
    (scratch / "lock").unlink(missing_ok=True)  # torch's own, of a process that was killed
    command = [sys.executable, str(csrc / "build_binding.py"), str(scratch), str(library)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    log = folder / "build.log"
    log.write_text(done.stdout + done.stderr)
    if done.returncode != 0:
        last = (done.stderr.strip() or "nothing was printed").splitlines()[-1]
        raise ImportError(f"the binding for it can't be compiled here: {last} (see {log})")
    os.replace(scratch / "_C.so", folder / "_C.so")
    _say(f"compiled in {time.monotonic() - started:.0f} s, and kept in {folder}")


def _say(text: str) -> None:
    print(f"fusedopt: {text}", file=sys.stderr, flush=True)
