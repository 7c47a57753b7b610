"""The binding that is compiled at the first import, where another torch is installed.

Here a script stands for the compiler. tests/release/ compiles in earnest, by hand.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fusedopt.core import extension, first_build

COMPILES = """
import pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
with (folder.parent / "runs").open("a") as runs:
    runs.write("x")
time.sleep(0.2)
(folder / "_C.so").write_text(sys.argv[2])
"""
FINDS = "def why_not_compile(python): return None"
FINDS_NONE = "def why_not_compile(python): return f'no compiler, {python}'"
FAILS = "import sys; print('one'); sys.exit('c++ says no')"
ASKS = """
import pathlib, sys
from fusedopt.core import first_build
print(first_build.compiled(pathlib.Path(sys.argv[1]), "9.9.0"))
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv(first_build.SWITCH, raising=False)
    return tmp_path / "cache"


def make_package(folder: Path, script: str, toolchain: str = FINDS) -> Path:
    package = folder / "fusedopt"
    (package / "csrc").mkdir(parents=True)
    (package / "csrc/build_binding.py").write_text(script)
    (package / "csrc/toolchain.py").write_text(toolchain)
    (package / "libfusedopt_kernels.so").touch()
    return package


def test_it_is_compiled_once_and_kept(tmp_path, cache, capfd):
    package = make_package(tmp_path, COMPILES)
    binding = first_build.compiled(package, "9.9.0")
    assert binding.read_text() == str(package / "libfusedopt_kernels.so")
    said = capfd.readouterr().err
    assert "compiling the binding for torch 9.9.0" in said and str(binding.parent) in said
    assert first_build.compiled(package, "9.9.0") == binding
    assert capfd.readouterr().err == ""
    assert (binding.parent / "runs").read_text() == "x"


def test_each_torch_and_each_build_of_the_kernels_has_a_binding_of_its_own(tmp_path, cache):
    package = make_package(tmp_path, COMPILES)
    one, two = (first_build.compiled(package, version) for version in ("9.8.0", "9.9.0"))
    (package / "libfusedopt_kernels.so").write_text("another")
    assert len({one, two, first_build.compiled(package, "9.9.0")}) == 3


def test_processes_that_need_the_same_one_wait_for_the_first(tmp_path, cache):
    package = make_package(tmp_path, COMPILES)
    command = [sys.executable, "-c", ASKS, str(package)]
    ranks = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    answers = {rank.communicate(timeout=120)[0] for rank in ranks}
    assert len(answers) == 1
    assert (Path(answers.pop().strip()).parent / "runs").read_text() == "x"


def test_what_the_compiler_says_is_the_reason(tmp_path, cache):
    package = make_package(tmp_path, FAILS)
    with pytest.raises(ImportError, match="c\\+\\+ says no") as error:
        first_build.compiled(package, "9.9.0")
    log = Path(str(error.value).rpartition("see ")[2].rstrip(")"))
    assert log.read_text() == "one\nc++ says no\n"


def test_it_does_not_begin_where_there_is_no_compiler(tmp_path, cache, capfd):
    package = make_package(tmp_path, COMPILES, FINDS_NONE)
    with pytest.raises(ImportError, match=r"can't be compiled here: no compiler, True$"):
        first_build.compiled(package, "9.9.0")
    assert capfd.readouterr().err == ""


def test_it_finds_ninja_in_an_environment_that_is_not_activated(tmp_path, cache, monkeypatch):
    package = make_package(tmp_path, COMPILES)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(first_build.sysconfig, "get_path", lambda name: str(tmp_path / name))
    with pytest.raises(ImportError, match="no ninja: `pip install ninja`"):
        first_build.compiled(package, "9.9.0")
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts/ninja").touch(0o755)
    assert first_build.compiled(package, "9.9.0").is_file()


def test_a_binding_that_was_compiled_needs_no_compiler(tmp_path, cache):
    package = make_package(tmp_path, COMPILES)
    binding = first_build.compiled(package, "9.9.0")
    (package / "csrc/toolchain.py").write_text(FINDS_NONE)
    assert first_build.compiled(package, "9.9.0") == binding


def test_half_a_file_of_a_process_that_was_killed_is_not_taken(tmp_path, cache):
    package = make_package(tmp_path, COMPILES)
    scratch = first_build.compiled(package, "9.9.0").parent / "build"
    (scratch.parent / "_C.so").unlink()
    (scratch / "_C.so").write_text("half")
    (scratch / "lock").touch()
    assert first_build.compiled(package, "9.9.0").read_text() != "half"


def test_it_can_be_forbidden(tmp_path, cache, monkeypatch):
    package = make_package(tmp_path, COMPILES)
    monkeypatch.setenv(first_build.SWITCH, "0")
    with pytest.raises(ImportError, match=f"{first_build.SWITCH}=0"):
        first_build.compiled(package, "9.9.0")
    assert not cache.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_that_is_not_ours_is_named(tmp_path, cache):
    cache.mkdir()
    cache.chmod(0o500)
    with pytest.raises(ImportError, match="TORCH_EXTENSIONS_DIR"):
        first_build.compiled(make_package(tmp_path, COMPILES), "9.9.0")


def test_a_binding_in_the_package_for_this_torch_comes_first(tmp_path, cache, monkeypatch):
    package = make_package(tmp_path, FAILS)
    built = package / f"_C{extension.EXTENSION_SUFFIXES[0]}"
    built.touch()
    prebuilt = package / "bindings/torch9.9/_C.so"
    prebuilt.parent.mkdir(parents=True)
    prebuilt.touch()
    taken = []
    monkeypatch.setattr(extension, "_load", lambda name, path: taken.append(path))
    found = extension._import(package, {"torch": "2.13.0"}, "9.9.1")
    assert taken == [prebuilt] and found.record == {"torch": "9.9.1"} and not found.broken
    extension._import(package, {"torch": "2.13.0"}, "2.13.1")
    assert taken == [prebuilt, built]


def test_a_package_that_was_built_without_torch_gets_its_binding_where_torch_is(
    tmp_path, cache, monkeypatch
):
    package = make_package(tmp_path, COMPILES)
    taken = []
    monkeypatch.setattr(extension, "_load", lambda name, path: taken.append(path))
    assert not extension.find("9.9.0", package, []).broken
    assert taken == [first_build.compiled(package, "9.9.0")]


def test_without_any_the_reason_names_both_versions_and_what_failed(tmp_path, cache):
    package = make_package(tmp_path, FAILS)
    built = package / f"_C{extension.EXTENSION_SUFFIXES[0]}"
    built.touch()
    found = extension._import(package, {"torch": "2.13.0"}, "9.9.1")
    assert found.module is None and found.broken
    for word in ("torch 2.13.0", "torch 9.9.1", "c++ says no", extension.INSTALL):
        assert word in str(found.reason)


def test_the_binding_gets_its_folders_as_they_are(monkeypatch, tmp_path):
    """Through the file that torch writes for ninja, and ninja's shell."""
    monkeypatch.syspath_prepend(extension.PACKAGE.parent / "csrc")
    import build_binding

    asked = {}
    monkeypatch.setattr(build_binding.cpp_extension, "load", lambda **it: asked.update(it))
    build_binding.build(tmp_path, Path("/a folder/libfusedopt_kernels.so"), "$ORIGIN/../..")
    ninja = f"flags = {' '.join(asked['extra_ldflags'])}\nrule say\n"
    ninja += "  command = printf '%s\\n' $flags > $out\nbuild said: say\n"
    (tmp_path / "build.ninja").write_text(ninja)
    subprocess.run(["ninja", "-C", str(tmp_path)], check=True, capture_output=True)
    said = (tmp_path / "said").read_text().splitlines()
    assert said[-3:] == ["-L/a folder", "-lfusedopt_kernels", "-Wl,-rpath,$ORIGIN/../.."]
