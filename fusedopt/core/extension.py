"""Finds the compiled extension and the kernels' library. If there is none, it says why in words.

It imports only the standard library: setup.py, which writes the record of a build, reads this file
before anything is installed.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

PACKAGE = Path(__file__).resolve().parent.parent
RECORD = "_build.json"
INSTALL = "pip install --no-build-isolation --force-reinstall --no-deps ."


class Found(NamedTuple):
    """The extension, or the reason why there is none.

    Attributes:
        module: the extension; None if it can't be used.
        reason: why it can't be used, in words; None if it can.
        broken: whether the extension's file exists but can't be imported.
        record: the record of its build: see `read_record`.
    """

    module: ModuleType | None
    reason: str | None
    broken: bool
    record: dict[str, Any]


def find(torch_version: str, package: Path = PACKAGE, path: list[str] | None = None) -> Found:
    """Imports `fusedopt._C` from `package`, or in a source folder from the installed package.

    Python prefers the folder that it is started in, so that in a clone the sources hide the
    installed package. The installed extension is used if it was compiled from the same sources.
    """
    record = read_record(package)
    if extension_in(package) or (library_in(package) and not is_source(package)):
        return _import(package, record, torch_version)
    if not is_source(package):
        why = record.get("missing") or "nothing says why"
        reason = f"{package} was installed without compiled kernels ({why})"
        return Found(None, reason, False, record)
    return _find_installed(torch_version, package, path)


def _find_installed(torch_version: str, source: Path, path: list[str] | None) -> Found:
    others = [folder for folder in packages_on(path) if folder != source]
    for other in others:
        if extension_in(other) or library_in(other):
            record = read_record(other)
            if record.get("sources") == fingerprint(source.parent):
                return _import(other, record, torch_version)
            reason = (
                f"Python imports fusedopt from {source}, which is not compiled. {other} is, but "
                f"from other sources. Run `{INSTALL}` in {source.parent} to compile these, or "
                "start Python in another folder"
            )
            return Found(None, reason, False, record)
    why = next((it["missing"] for it in map(read_record, others) if it.get("missing")), None)
    reason = f"the source folder {source.parent} is not compiled. Run `{INSTALL}` in it"
    if why is not None:
        reason = (
            f"neither the source folder {source.parent} nor what is installed is compiled: {why}"
        )
    return Found(None, reason, False, {})


def find_library(
    name: str = "kernels", package: Path = PACKAGE, path: list[str] | None = None
) -> Path:
    """The library of this name in `package`, or for a source folder in the installed package.

    Raises:
        ImportError: there is none.
    """
    if library := library_in(package, name):
        return library
    if is_source(package):
        sources = fingerprint(package.parent)
        for other in packages_on(path):
            library = library_in(other, name)
            if library and read_record(other).get("sources") == sources:
                return library
    why = read_record(package).get("missing") or f"run `{INSTALL}` in the source folder"
    raise ImportError(f"there is no compiled libfusedopt_{name} in {package}: {why}")


def library_in(package: Path, name: str = "kernels") -> Path | None:
    """The file of one of our libraries: "kernels", "jax" or "tensorflow"."""
    files = [package / f"libfusedopt_{name}.{suffix}" for suffix in ("so", "dylib")]
    return next((file for file in files if file.is_file()), None)


def packages_on(path: list[str] | None = None) -> list[Path]:
    """The folders of this package's name on Python's path, the first one first."""
    entries = sys.path if path is None else path
    folders = [Path(entry or ".").resolve() / PACKAGE.name for entry in entries]
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


def extension_in(package: Path) -> Path | None:
    """The extension's file for this Python; if there is none, a file for another Python."""
    files = [package / f"_C{suffix}" for suffix in EXTENSION_SUFFIXES]
    files += [*sorted(package.glob("_C.*.so")), *sorted(package.glob("_C.*.pyd"))]
    return next((file for file in files if file.is_file()), None)


def is_source(package: Path) -> bool:
    """Whether the package lies in a source folder, beside its setup.py and csrc."""
    return (package.parent / "setup.py").is_file() and (package.parent / "csrc").is_dir()


def read_record(package: Path) -> dict[str, Any]:
    """The record that the build left in the package; empty if there is none.

    Its keys are "torch": the version that the extension was compiled for, or None; "missing": why
    there is no extension, or None; "no_cuda": why there are no CUDA kernels, or None;
    "tensorflow": the version that TensorFlow's op was compiled for, or None; "sources": the
    `fingerprint` of the compiled sources.
    """
    try:
        record = json.loads((package / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def fingerprint(root: Path) -> str:
    """A hash of all sources that the extension is compiled from."""
    digest = hashlib.sha256()
    files = [path for path in (root / "csrc").rglob("*.*") if path.parent.name != "__pycache__"]
    for path in [*sorted(files), root / "setup.py"]:
        digest.update(path.relative_to(root).as_posix().encode() + b"\0")
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()


def _import(package: Path, record: dict[str, Any], torch_version: str) -> Found:
    extension = extension_in(package)
    cause = why_unfit(extension, record, torch_version)
    try:
        if extension is None or cause is not None:
            extension = _another(package, torch_version)
            record = {**record, "torch": torch_version}
        return Found(_load(f"{PACKAGE.name}._C", extension), None, False, record)
    except ImportError as error:
        cause = f"{cause}, and {error}" if cause else f"can't be imported ({error})"
    reason = f"{extension or package} {cause}. Build it again: `{INSTALL}` in the source folder"
    return Found(None, reason, True, record)


def _another(package: Path, torch_version: str) -> Path:
    """The binding for this torch, from the package or compiled now.

    Raises:
        ImportError: there is none.
    """
    from fusedopt.core import first_build

    prebuilt = package / "bindings" / f"torch{'.'.join(minor(torch_version))}" / "_C.so"
    return prebuilt if prebuilt.is_file() else first_build.compiled(package, torch_version)


def _load(name: str, extension: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, extension)
    if spec is None or spec.loader is None:
        raise ImportError(f"{extension.name} is no file that this Python can import")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except ImportError:
        del sys.modules[name]
        raise
    return module


def why_unfit(extension: Path | None, record: dict[str, Any], torch_version: str) -> str | None:
    """Why an extension must not be loaded here; None if it may be.

    torch's C++ classes change between minor versions. An extension for another version may load,
    but would read memory wrongly.
    """
    if extension is None:
        return "was built without torch"
    if extension.name.removeprefix("_C") not in EXTENSION_SUFFIXES:
        here = f"{sys.implementation.name} {sys.version_info.major}.{sys.version_info.minor}"
        return f"is compiled for another Python than this {here}"
    if (built := record.get("torch")) and minor(built) != minor(torch_version):
        return f"is compiled for torch {built}, but torch {torch_version} runs here"
    return None


def minor(version: str) -> list[str]:
    return version.split(".")[:2]
