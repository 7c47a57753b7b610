"""The build: which objects are made from which sources, also on machines that lack a tool."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import threading
import time
from pathlib import Path

import pytest

import fusedopt
from fusedopt.core import backends

ROOT = Path(__file__).parent.parent

spec = importlib.util.spec_from_file_location("fusedopt_setup", ROOT / "setup.py")
assert spec is not None and spec.loader is not None
setup = importlib.util.module_from_spec(spec)
spec.loader.exec_module(setup)
toolchain = sys.modules["toolchain"]  # beside csrc, where setup.py has found it


def python(
    *arguments: object, cwd: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    environment = {**os.environ, **environment}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture
def nvcc(tmp_path):
    """A compiler of CUDA that knows some architectures, and can do nothing else."""
    path = tmp_path / "bin/nvcc"
    path.parent.mkdir()
    path.write_text("#!/bin/sh\nprintf 'compute_%s\\n' 75 80 87 90 100 103\n")
    path.chmod(0o755)
    return path


def test_cuda_is_left_out_insisted_on_or_refused(monkeypatch, nvcc, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("FUSEDOPT_CUDA", "1")
    assert toolchain.find_nvcc() == nvcc
    monkeypatch.setenv("FUSEDOPT_CUDA", "0")
    assert toolchain.find_nvcc() is None
    monkeypatch.setenv("FUSEDOPT_CUDA", "yes")
    with pytest.raises(SystemExit, match="FUSEDOPT_CUDA is 'yes'; it takes 0 or 1"):
        toolchain.find_nvcc()


def test_cuda_that_is_insisted_on_and_not_there(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("FUSEDOPT_CUDA", "")
    assert toolchain.find_nvcc() is None
    monkeypatch.setenv("FUSEDOPT_CUDA", "1")
    with pytest.raises(SystemExit, match="set CUDA_HOME"):
        toolchain.find_nvcc()


def test_cuda_without_a_gpu_is_left_out_unless_it_is_asked_for(monkeypatch, nvcc, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("FUSEDOPT_CUDA", "")
    monkeypatch.setattr(toolchain, "has_gpu", lambda: True)
    assert toolchain.choose_cuda() == (nvcc, None)
    monkeypatch.setattr(toolchain, "has_gpu", lambda: False)
    left_out = f"there is no GPU here. To build them with {nvcc}, set FUSEDOPT_CUDA=1"
    assert toolchain.choose_cuda() == (None, left_out)
    monkeypatch.setenv("FUSEDOPT_CUDA", "1")
    assert toolchain.choose_cuda() == (nvcc, None)
    monkeypatch.setenv("FUSEDOPT_CUDA", "0")
    assert toolchain.choose_cuda() == (None, "FUSEDOPT_CUDA=0 left them out")
    nvcc.unlink()
    monkeypatch.setenv("FUSEDOPT_CUDA", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert toolchain.choose_cuda()[1].startswith("no nvcc was found")


@pytest.mark.parametrize(
    ("prints", "gpu"), [("GPU 0: NVIDIA H200 (UUID: GPU-1)", True), ("No devices found.", False)]
)
def test_a_gpu_is_what_nvidia_smi_lists(monkeypatch, tmp_path, prints, gpu):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{prints}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert toolchain.has_gpu() == gpu


def test_a_compiler_that_fails_ends_the_build_with_what_to_do(monkeypatch):
    toolchain.check_compiler()
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(SystemExit, match=r"(?s)makes no program:\nfalse .*FUSEDOPT_PURE_PYTHON=1"):
        toolchain.check_compiler()
    monkeypatch.setenv("CXX", "no-compiler")
    assert toolchain.why_not_compile().startswith("There is no C++ compiler 'no-compiler'.")
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(toolchain.sysconfig, "get_path", lambda name: "/nonexistent")
    with pytest.raises(SystemExit, match=r"no /nonexistent/Python\.h. Install .*python3-dev"):
        toolchain.check_compiler()


def test_openmp_is_asked_for_where_the_compiler_has_it(monkeypatch, tmp_path, capsys):
    assert toolchain.openmp() == (["-fopenmp"], ["-fopenmp"])
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\ncase "$*" in *openmp*) exit 1;; esac\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    for platform in ("linux", "darwin"):
        monkeypatch.setattr(toolchain.sys, "platform", platform)
        assert toolchain.openmp() == ([], [])
    assert "no OpenMP" in capsys.readouterr().err


def test_without_torch_the_library_is_built_and_the_record_says_what_is_missing(tmp_path):
    """As in pip's isolated environment. What an earlier build left is removed.

    The compiler is a stand-in: nothing is really compiled.
    """
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    package = tmp_path / "fusedopt"
    shutil.copytree(
        ROOT / "fusedopt", package, ignore=shutil.ignore_patterns("*.so", "__pycache__", "*.json")
    )
    compiler = tmp_path / "c++"
    compiler.write_text(
        '#!/bin/sh\nwhile [ $# -gt 1 ]; do [ "$1" = -o ] && touch "$2"; shift; done\n'
    )
    compiler.chmod(0o755)
    old = [f"_C{sysconfig.get_config_var('EXT_SUFFIX')}", "libfusedopt_tensorflow.so"]
    for name in old:
        (package / name).touch()
    environment = {"CXX": str(compiler), "FUSEDOPT_CUDA": "0"}
    code = "import sys, runpy, importlib.util; find = importlib.util.find_spec; sys.argv = {argv}; "
    code += "hidden = 'torch', 'jaxlib', 'tensorflow'; "
    code += "importlib.util.find_spec = lambda name: None if name in hidden else find(name); "
    code += "sys.modules['torch'] = None; runpy.run_path('setup.py', run_name='__main__')"
    done = python("-c", code.format(argv=["setup.py", "egg_info"]), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "fusedopt.egg-info/PKG-INFO").exists()
    argv = ["setup.py", "build_ext", "--inplace"]
    done = python("-c", code.format(argv=argv), cwd=tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert [it.name for it in package.glob("*.so")] == ["libfusedopt_kernels.so"]
    record = json.loads((package / "_build.json").read_text())
    assert record["torch"] is None
    for text in (done.stderr, record["missing"]):
        assert "compiled when fusedopt is first used" in text


def test_the_folder_of_the_binding_does_not_pass_for_torch():
    assert ROOT / "csrc" not in [Path(entry).resolve() for entry in sys.path]


def test_every_file_names_this_version():
    version = fusedopt.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    newest = next(it for it in (ROOT / "CHANGELOG.md").read_text().splitlines() if "## " in it)
    assert newest.startswith(f"## {version} ")


def test_a_source_distribution_has_every_file(tmp_path):
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode != 0:
        pytest.skip("not a git checkout")
    files = {name for name in tracked.stdout.splitlines() if (ROOT / name).exists()}
    for name in files:
        copy = tmp_path / "source" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy)
    command = ["setup.py", "--quiet", "sdist", "--formats=tar", f"--dist-dir={tmp_path}"]
    done = python(*command, cwd=tmp_path / "source", FUSEDOPT_PURE_PYTHON="1")
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("fusedopt-*.tar")
    with tarfile.open(archive) as packed:
        packed_files = {name.partition("/")[2] for name in packed.getnames()}
    assert files - packed_files <= {".gitignore"}


def test_without_ninja_sources_compile_at_once(monkeypatch, tmp_path):
    from setuptools._distutils.ccompiler import new_compiler

    monkeypatch.setenv("MAX_JOBS", "2")
    compiler = new_compiler()
    both = threading.Barrier(2)

    def compile_one(output, source, *rest):
        both.wait(timeout=60)  # as long as the two are compiled one after the other
        Path(output).touch()

    monkeypatch.setattr(compiler, "_compile", compile_one)
    sources = [str(tmp_path / name) for name in ("a.cpp", "b.cpp")]
    for source in sources:
        Path(source).touch()
    setup.compile_at_once(compiler)
    objects = compiler.compile(sources, output_dir=str(tmp_path / "out"))
    assert len(objects) == 2 and all(Path(path).exists() for path in objects)


def test_architectures(monkeypatch, nvcc):
    def flags(names):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", names)
        return [
            flag.removeprefix("-gencode=arch=compute_")
            for flag in toolchain.architecture_flags(nvcc)
        ]

    assert flags("7.5;8.0+PTX") == ["75,code=[sm_75]", "80,code=[sm_80,compute_80]"]
    assert flags("7.5 8.0+PTX") == flags("7.5;8.0+PTX")
    # Later ones share an older one's PTX; what runs on no other card is made for itself.
    assert flags("8.0;8.6;9.0+PTX") == ["80,code=[sm_80,sm_86,sm_90,compute_80]"]
    assert flags("8.6;8.0") == ["86,code=[sm_86]", "80,code=[sm_80]"]
    assert flags("9.0;10.0;12.0") == ["90,code=[sm_90]", "100,code=[sm_100,sm_120]"]
    assert flags("9.0a;9.0") == ["90a,code=[sm_90a]", "90,code=[sm_90]"]
    assert flags("9.0;9.0a") == ["90,code=[sm_90]", "90a,code=[sm_90a]"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;nine")
    with pytest.raises(SystemExit, match="'nine' is not like"):
        toolchain.architecture_flags(nvcc)


def test_default_architectures_end_in_code_for_later_ones(monkeypatch, nvcc):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    codes = [flag.rpartition("code=")[2] for flag in toolchain.architecture_flags(nvcc)]
    assert codes == ["[sm_75]", "[sm_80,sm_90]", "[sm_100,compute_100]"]


@pytest.mark.parametrize(
    ("environment", "why"),
    [
        ({"CXX": "/nonexistent/c++"}, "no C++ compiler '/nonexistent/c++' was found"),
        ({"FUSEDOPT_PURE_PYTHON": "1"}, "FUSEDOPT_PURE_PYTHON=1 was set"),
    ],
    ids=str,
)
def test_without_a_compiler_all_steps_run_in_plain_torch(tmp_path, environment, why):
    pytest.importorskip("pip")
    tree, target = tmp_path / "tree", tmp_path / "target"
    artifacts = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("csrc", "fusedopt"):
        shutil.copytree(ROOT / name, tree / name, ignore=artifacts)
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tree)
    left = tree / "build/lib/fusedopt"  # by an earlier build
    left.mkdir(parents=True)
    for name in ("_C.so", "old.py"):
        (left / name).touch()
    options = ["--verbose", "--no-build-isolation", "--no-deps", "--no-index", "--target", target]
    installed = python("-m", "pip", "install", *options, tree, **environment)
    assert installed.returncode == 0, installed.stdout + installed.stderr
    assert f"installing WITHOUT the compiled kernels: {why}" in installed.stdout + installed.stderr
    assert not list(target.rglob("*.so")) and not (target / "fusedopt/old.py").exists()
    assert (target / "fusedopt/py.typed").exists()

    path = os.pathsep.join(filter(None, [str(target), os.environ.get("PYTHONPATH")]))
    code = """if True:
        import torch, fusedopt
        for _ in range(2):
            param = torch.ones(3, requires_grad=True)
            param.grad = torch.ones(3)
            optimizer = fusedopt.FusedAdam([param], lr=0.5, max_grad_norm=1.0)
            optimizer.step()
            optimizer.step()
        print(fusedopt.__file__, *param.tolist())
    """
    ran = python("-c", code, cwd=tmp_path, PYTHONPATH=path)
    assert ran.returncode == 0, ran.stderr
    file, *values = ran.stdout.split()
    assert Path(file).is_relative_to(target)
    assert all(abs(float(value)) < 1e-6 for value in values)
    assert ran.stderr.count("RuntimeWarning: fusedopt runs on torch's own functions") == 1
    assert f"{target / 'fusedopt'} was installed without compiled kernels ({why}" in ran.stderr

    checked = python("-m", "fusedopt", cwd=tmp_path, PYTHONPATH=path)
    assert checked.returncode == 1
    assert f"NOT COMPILED: {target / 'fusedopt'} was installed without" in checked.stdout


@pytest.fixture
def kernels(monkeypatch, tmp_path):
    """Sources of two objects that every rule shares, of which one has a header of its own."""
    monkeypatch.setattr(setup, "CSRC", tmp_path)
    (tmp_path / "rules").mkdir()
    (tmp_path / "rules/all.h").write_text("#define FOR_EACH(DO) DO(Adam) DO(SGD)\n")
    (tmp_path / "own.h").write_text("struct Adam {}; struct SGD {};\n")
    folder = tmp_path / "cpu"
    folder.mkdir()
    (folder / "shared.cpp").write_text("int shared() { return 1; }\n")
    (folder / "passes.cpp").write_text('#include "../own.h"\nvoid run(FUSEDOPT_RULE) {}\n')
    return [folder / "shared.cpp", folder / "passes.cpp"]


def compiled(capsys, kernels, folder: Path, *flags: str) -> set[str]:
    """Names of the objects that are made, not found."""
    capsys.readouterr()
    objects = setup.compile_objects(setup.objects(folder, kernels, [*setup.cxx(), *flags]))
    assert all(Path(path).exists() for path in objects)
    return set(re.findall(r"(\w+)\.o$", capsys.readouterr().out, re.MULTILINE))


def test_every_rule_is_an_object_and_only_what_changed_is_made_again(capsys, kernels, tmp_path):
    folder, per_rule = tmp_path / "out", {"cpu_passes_Adam", "cpu_passes_SGD"}
    assert compiled(capsys, kernels, folder) == {"cpu_shared"} | per_rule
    assert compiled(capsys, kernels, folder) == set()
    dependencies = folder / "cpu_shared.d"
    dependencies.write_text(dependencies.read_text().replace(":", " :", 1))  # as nvcc has it
    assert compiled(capsys, kernels, folder) == set()
    later = time.time() + 5
    os.utime(tmp_path / "own.h", (later, later))
    assert compiled(capsys, kernels, folder) == per_rule
    os.utime(tmp_path / "own.h", (1, 1))
    assert compiled(capsys, kernels, folder) == set()
    (folder / "cpu_shared.o").unlink()
    assert compiled(capsys, kernels, folder) == {"cpu_shared"}
    assert compiled(capsys, kernels, folder, "-O1") == {"cpu_shared"} | per_rule


def test_errors_of_the_compiler_are_shown_and_found_again(capsys, kernels, tmp_path):
    compiled(capsys, kernels, tmp_path / "out")
    kernels[0].write_text("int shared() { return unheard_of; }\n")
    later = time.time() + 5
    os.utime(kernels[0], (later, later))
    for _ in range(2):
        with pytest.raises(SystemExit, match="unheard_of"):
            compiled(capsys, kernels, tmp_path / "out")


def resource_reports() -> dict[Path, str]:
    """What nvcc reports of each object of the kernels that are built here."""
    if backends._C is None or not backends._C.built_with_cuda:
        pytest.skip("CUDA kernels are not built here")
    reports = {path: path.read_text() for path in ROOT.glob("build/temp*/cuda_*.log")}
    if not reports:
        pytest.skip("the extension was built elsewhere")
    return reports


def test_every_rule_and_norm_is_in_the_report():
    names = " ".join(resource_reports().values())
    rules = re.findall(r"DO\((\w+)\)", (ROOT / "csrc/rules/all.h").read_text())
    assert len(rules) >= 5
    for kernel in [*(f"update_kernel\\S+{rule}" for rule in rules), "grad_norm", "upload"]:
        assert re.search(rf"Compiling entry function '\S*{kernel}", names), kernel


def test_no_kernel_spills_registers():
    for report, text in resource_reports().items():
        functions = re.findall(
            r"Function properties for (\S+)\n.* (\d+) bytes spill stores, (\d+) bytes spill loads",
            text,
        )
        assert len(functions) >= text.count("Compiling entry function") > 0
        spilling = {name for name, *spilled in functions if spilled != ["0", "0"]}
        assert not spilling, f"{report}: {spilling}"


def test_registers_allow_the_blocks_that_a_pass_needs():
    """Of 256 threads: four for the norm pass, three with telemetry, two for the update pass."""
    limits = {"grad_norm_kernel.*Lb0E": 64, "grad_norm_kernel.*Lb1E": 80, "": 128}  # <telemetry>
    for report, text in resource_reports().items():
        used = re.findall(r"entry function '(\S+)'(?:.*\n)+?.*Used (\d+) registers", text)
        assert used
        for name, registers in used:
            limit = next(limits[kind] for kind in limits if re.search(kind, name))
            assert int(registers) <= limit, f"{report}: {name}"


def test_import_is_quick():
    """Beside torch. In seconds of this process, whatever else the machine does."""
    code = "import time, torch; start = time.process_time(); import fusedopt; "
    code += "print(time.process_time() - start)"
    seconds = min(float(python("-c", code).stdout) for _ in range(3))
    assert seconds < 0.1


def test_everything_the_extension_needs_is_in_torch():
    if backends.why_missing("cpu") is not None:
        pytest.fail(f"the extension is to be tested, but {backends.why_missing('cpu')}")
    done = python("-c", "import torch, fusedopt._C", LD_BIND_NOW="1")
    assert done.returncode == 0, done.stderr
