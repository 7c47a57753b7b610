"""The compiled extension that is found, and the message if there is none."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import types
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CLASSES

import fusedopt
from fusedopt.core import agreement, backends, extension

RUNNING = torch.__version__
USES = """
import fusedopt, torch
param = torch.ones(3, requires_grad=True)
param.grad = param.detach().clone()
fusedopt.FusedAdam([param]).step()
"""


@pytest.fixture
def taken(monkeypatch):
    """The packages whose extension would be imported."""
    files = []

    def note(package, record, torch_version):
        files.append(package)
        return extension.Found(None, None, False, record)

    monkeypatch.setattr(extension, "_import", note)
    return files


def make_package(folder: Path, compiled: bool, sources: str | None = None, **record) -> Path:
    """A package, beside its sources (files with this text) or without any."""
    package = folder / "fusedopt"
    package.mkdir(parents=True)
    if sources is not None:
        (folder / "csrc").mkdir()
        (folder / "csrc/kernel.cpp").write_text(sources)
        (folder / "setup.py").touch()
    if compiled:
        (package / f"_C{EXTENSION_SUFFIXES[0]}").touch()
    if record:
        (package / extension.RECORD).write_text(json.dumps(record))
    return package


def fingerprint(tmp_path: Path, sources: str) -> str:
    make_package(tmp_path / sources, False, sources)
    return extension.fingerprint(tmp_path / sources)


def test_the_folder_own_extension_comes_first(tmp_path, taken):
    package = make_package(tmp_path / "here", True, "new")
    other = make_package(tmp_path / "there", True, sources=None, torch=RUNNING)
    extension.find(RUNNING, package, [str(other.parent)])
    assert taken == [package]


def test_sources_do_not_hide_the_build_that_was_made_of_them(tmp_path, taken):
    package = make_package(tmp_path / "clone", False, "same")
    installed = make_package(tmp_path / "site", True, sources=None, torch=RUNNING)
    record = {"torch": RUNNING, "sources": fingerprint(tmp_path, "same")}
    (installed / extension.RECORD).write_text(json.dumps(record))
    found = extension.find(RUNNING, package, [str(package.parent), str(installed.parent)])
    assert found.record == record
    assert taken == [installed]


def test_a_build_of_other_sources_is_not_taken_and_both_are_named(tmp_path, taken):
    package = make_package(tmp_path / "clone", False, "new")
    installed = make_package(tmp_path / "site", True)
    (installed / extension.RECORD).write_text(json.dumps({"sources": "of old ones"}))
    found = extension.find(RUNNING, package, [str(installed.parent)])
    assert not taken and not found.broken
    for text in (str(package), str(installed), "from other sources", "pip install"):
        assert text in found.reason


@pytest.mark.parametrize("missing", [None, "no C++ compiler 'c++' was found"])
@pytest.mark.parametrize("sources", [None, "some"])
def test_why_nothing_is_compiled(tmp_path, sources, missing):
    record = {"missing": missing} if missing else {}
    package = make_package(tmp_path / "here", False, sources, **(record if not sources else {}))
    installed = make_package(tmp_path / "site", False, **(record if sources else {}))
    found = extension.find(RUNNING, package, [str(installed.parent)])
    assert found.module is None and not found.broken
    assert (missing or ("`pip install" if sources else "nothing says why")) in found.reason
    assert ("source folder" in found.reason) == bool(sources)


@pytest.mark.parametrize(
    ("built", "loads"),
    [
        ("2.13.0+cpu", False),
        ("2.1.0", False),
        ("2.15.1", True),
        ("2.15.0+cu130", True),
        (None, True),
    ],
)
def test_an_extension_of_another_minor_version_of_torch_is_not_loaded(
    tmp_path, monkeypatch, built, loads
):
    """Even where it could be: what it knows of torch's memory may be wrong."""
    module = types.ModuleType("_C")
    monkeypatch.setattr(extension, "_load", lambda name, file: module)
    package = make_package(tmp_path, True, torch=built)
    found = extension.find("2.15.0", package, [])
    assert (found.module is module) == loads and found.broken != loads
    if not loads:
        path = package / f"_C{EXTENSION_SUFFIXES[0]}"
        cause = f"is compiled for torch {built}, but torch 2.15.0 runs here"
        why = "the package lacks the sources to compile the binding for it"
        remedy = f"Build it again: `{extension.INSTALL}` in the source folder"
        assert found.reason == f"{path} {cause}, and {why}. {remedy}"


def test_a_file_that_cannot_be_imported_is_broken(tmp_path):
    package = make_package(tmp_path, False, torch="1.0")
    (package / f"_C{EXTENSION_SUFFIXES[0]}").write_bytes(b"no library")
    found = extension.find(RUNNING, package, [])
    assert found.module is None and found.broken
    assert f"is compiled for torch 1.0, but torch {RUNNING} runs here" in found.reason


def test_the_extension_of_another_python_is_named(tmp_path):
    package = make_package(tmp_path, False)
    (package / "_C.cpython-27-vax.so").touch()
    found = extension.find(RUNNING, package, [])
    assert found.broken and "is compiled for another Python than this" in found.reason


def test_a_broken_extension_is_told_at_the_first_use(tmp_path):
    package = tmp_path / "fusedopt"
    artifacts = shutil.ignore_patterns("*.so", "__pycache__", extension.RECORD)
    shutil.copytree(extension.PACKAGE, package, ignore=artifacts)
    (package / f"_C{EXTENSION_SUFFIXES[0]}").write_bytes(b"no library")
    (package / extension.RECORD).write_text(json.dumps({"torch": "2.0.0"}))
    done = subprocess.run(
        [sys.executable, "-c", USES],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("RuntimeWarning") == 1
    assert "fusedopt runs on torch's own functions" in done.stderr
    assert f"is compiled for torch 2.0.0, but torch {RUNNING} runs here" in done.stderr


def test_why_there_are_no_cuda_kernels(monkeypatch):
    monkeypatch.setattr(backends._C, "built_with_cuda", False)
    record = {"no_cuda": "FUSEDOPT_CUDA=0 left them out"}
    monkeypatch.setattr(backends, "found", backends.found._replace(record=record))
    expected = "fusedopt was built without CUDA kernels: FUSEDOPT_CUDA=0 left them out"
    assert backends.why_missing("cuda") == expected


def test_kernels_that_disagree_with_python_are_refused():
    found = backends.found
    if found.module is None:
        pytest.skip("the extension is not built")
    assert agreement.checked(found) is found
    other = types.SimpleNamespace(
        __file__="_C.so", constants={**found.module.constants, "chunk_size": 4096}
    )
    refused = agreement.checked(found._replace(module=other))
    assert refused.module is None and refused.broken
    assert "chunk_size is 4096" in refused.reason and "16384" in refused.reason


def test_a_rule_with_other_states_than_its_kernels_is_refused():
    if backends._C is None:
        pytest.skip("the extension is not built")
    for rule in {case.cls.rule.name: case.cls.rule for case in CLASSES}.values():
        agreement.check_rule(rule, backends._C.constants)
        other = dataclasses.replace(rule, tensors=("momentum_buffer", "exp_avg"))
        with pytest.raises(ImportError, match=f"the kernels of {rule.name} keep"):
            agreement.check_rule(other, backends._C.constants)


def test_a_rule_that_the_extension_lacks_says_so():
    rule = fusedopt.FusedAdamW.rule
    with pytest.raises(ImportError, match=f"no kernels of {rule.name}. Build it again"):
        agreement.check_rule(rule, {"rules": {}})


def test_a_limit_that_the_kernels_do_not_know_is_refused():
    if backends._C is None:
        pytest.skip("the extension is not built")
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = fusedopt.FusedSGD([param], lr=0.5, max_grad_norm=fusedopt.clip.ZScore())
    optimizer.step()
    before = param.detach().clone()
    plan: Any = optimizer._plan
    for kind, arguments in ((7, []), (-1, []), (2, [0.5] * 5), (2, [0.5] * 3)):
        with pytest.raises(TypeError, match=f"no limit of kind {kind} with {len(arguments)}"):
            plan.step(
                optimizer.param_groups,
                optimizer.state,
                *(1.0, True, True, None, None),
                (kind, arguments, torch.zeros(3, dtype=torch.float64)),
                torch.zeros(7, dtype=torch.float64),
            )
    assert torch.equal(param.detach(), before)
