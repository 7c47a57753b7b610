"""A message about a missing library, instead of a traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def needs(*packages: str) -> Iterator[None]:
    """Wraps imports. If one fails, it says how to install all of these packages."""
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing in ("", "fusedopt"):
            raise
        install = f"{Path(sys.executable).name} -m pip install {' '.join(packages)}"
        sys.exit(f"{Path(sys.argv[0]).name} needs {missing}, which isn't installed: {install}")
