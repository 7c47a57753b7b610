"""Builds the kernels' library, and what binds it to torch, JAX and TensorFlow where these are.

The CPU kernels are always built, the CUDA kernels where there are an nvcc and a GPU. What is built,
for which torch, and why something is left out, is recorded beside the library: see
fusedopt/core/extension.py.

Environment:
    FUSEDOPT_CUDA=0 or 1      leave the CUDA kernels out, or build them without a GPU too
    FUSEDOPT_PURE_PYTHON=1    compile nothing at all
    TORCH_CUDA_ARCH_LIST      architectures as torch's own extensions take them: "8.0;9.0+PTX"
    CUDA_HOME                 where to look for nvcc first
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT.resolve() / "csrc"))

from toolchain import (  # noqa: E402
    CXX_FLAGS,
    architecture_flags,
    check_compiler,
    choose_cuda,
    cuda_root,
    cxx,
    jobs_at_once,
    openmp,
    say,
    static_runtime,
)

sys.path.pop(0)  # or else csrc/torch would pass for an installed torch

CSRC = Path("csrc")
NO_TORCH = (
    "the build saw no torch: pip builds in an environment of its own, which hides an installed "
    "torch. The binding to torch is compiled when fusedopt is first used with it; `pip install "
    "--no-build-isolation .` compiles it at once"
)

INCLUDES = ["-Icsrc"]  # the kernels' own headers; they include nothing of torch
# Quoted includes alone: csrc/torch is not to stand in for <torch/...>.
BINDING_INCLUDES = ["-iquote", str(ROOT.resolve() / CSRC)]
# What csrc/build_binding.py and csrc/build_op.py compile and include.
BINDING_NEEDS = ["*.h", "*.py", "torch/*.*", "core/*.h", "math/*.h", "rules/*.h"]
BINDING_NEEDS += ["tensorflow/*.*", "c/*.h"]
KERNEL_FLAGS = ["-std=c++17", "-fPIC", *CXX_FLAGS, *INCLUDES]
NVCC_FLAGS = (
    "-std=c++17 -O3 --expt-relaxed-constexpr -fmad=false -prec-div=true -prec-sqrt=true -ftz=false"
).split()


def nvcc_command(nvcc: Path) -> list[str]:
    threads = max(1, jobs_at_once() // 4)  # at once per object, of which there are some more
    return [str(nvcc), *NVCC_FLAGS, *INCLUDES, *architecture_flags(nvcc), f"--threads={threads}",
            "-Xcompiler=-fPIC,-ffp-contract=off", "-Xptxas=-v"]  # fmt: skip


def objects(folder: Path, sources: list[Path], compiler: list[str]) -> dict[Path, list[str]]:
    """The objects of these sources of the kernels, and the command for each.

    A source that names FUSEDOPT_RULE makes one for every rule of csrc/rules/all.h. None includes
    anything of torch, so that the CUDA kernels are the same for any build of it.
    """
    rules = re.findall(r"DO\((\w+)\)", (CSRC / "rules/all.h").read_text())
    commands = {}
    for source in sorted(sources):
        for rule in rules if "FUSEDOPT_RULE" in source.read_text() else [""]:
            name = f"{source.parent.name}_{source.stem}{rule and f'_{rule}'}.o"
            output = folder.absolute() / name
            options = [f"-DFUSEDOPT_RULE={rule}"] if rule else []
            options += ["-MMD", "-MF", str(output.with_suffix(".d"))]
            commands[output] = [*compiler, *options, "-c", str(source), "-o", str(output)]
    return commands


def is_current(output: Path, command: list[str]) -> bool:
    """Whether this very command has made it of files that have not changed since."""
    stamp, dependencies = output.with_suffix(".command"), output.with_suffix(".d")
    if not (output.exists() and stamp.exists() and stamp.read_text() == shlex.join(command)):
        return False
    inputs = shlex.split(dependencies.read_text().partition(": ")[2].replace("\\\n", " "))
    made = output.stat().st_mtime
    return all(os.path.exists(path) and os.path.getmtime(path) <= made for path in inputs)


def compile_objects(commands: dict[Path, list[str]]) -> list[str]:
    """Runs the commands whose objects are not current, MAX_JOBS at once, and returns all objects.

    What a compiler says (nvcc: the registers and spills of each kernel) is left in a .log beside
    its object.
    """
    errors = []
    finished = 0
    said = time.monotonic()

    def make(output: Path) -> None:
        nonlocal finished, said
        if errors:
            return
        command = shlex.join(commands[output])
        print(command, flush=True)
        stamp = output.with_suffix(".command")
        stamp.unlink(missing_ok=True)
        done = subprocess.run(commands[output], capture_output=True, text=True)
        output.with_suffix(".log").write_text(done.stderr)
        if done.returncode != 0:
            errors.append(f"{command}\n{done.stdout}{done.stderr}")
        else:
            stamp.write_text(command)
        finished += 1
        if time.monotonic() > said + 30:
            said = time.monotonic()
            say(f"compiled {finished} of {len(outdated)} objects of the kernels")

    for folder in {output.parent for output in commands}:
        folder.mkdir(parents=True, exist_ok=True)
    outdated = [output for output, command in commands.items() if not is_current(output, command)]
    with ThreadPoolExecutor(jobs_at_once()) as pool:
        list(pool.map(make, outdated))
    if errors:
        sys.exit("\n".join(errors))
    return list(map(str, commands))


def binding_sources() -> list[Path]:
    return [*CSRC.glob("torch/*.cpp")]


def kernel_sources() -> list[Path]:
    return [path for folder in (".", "core", "cpu", "c") for path in CSRC.glob(f"{folder}/*.cpp")]


def make_extension(kind: Callable[..., Extension]) -> Extension:
    extension = kind("fusedopt._C", sorted(map(str, binding_sources())))
    extension.depends = sorted(str(path) for path in CSRC.rglob("*.*"))
    return extension


def link_library(
    folder: Path, commands: dict[Path, list[str]], libraries: list[str]
) -> tuple[Path, list[str]]:
    """The kernels as a shared library of their own, and the arguments that link to it."""
    # A process takes two libraries of one name for the same: a build beside another has a suffix.
    name = f"fusedopt_kernels{os.environ.get('FUSEDOPT_LIBRARY_SUFFIX', '')}"
    mac = sys.platform == "darwin"
    library = folder.absolute() / f"lib{name}.{'dylib' if mac else 'so'}"
    command = [*cxx(), "-shared", *compile_objects(commands), *libraries, "-o", str(library)]
    if mac:
        command.append(f"-Wl,-install_name,@rpath/{library.name}")
    subprocess.run(command, check=True)
    here = "@loader_path" if mac else "$ORIGIN"
    return library, [f"-L{library.parent}", f"-l{name}", f"-Wl,-rpath,{here}"]


def build_for_jax(folder: Path, linking: list[str]) -> list[Path]:
    """The library of JAX's custom call, where jaxlib is installed."""
    jaxlib = find_spec("jaxlib")
    if jaxlib is None or jaxlib.origin is None:
        return []
    headers = Path(jaxlib.origin).parent / "include"
    if not (headers / "xla/ffi/api/ffi.h").is_file():
        say(f"building without JAX's custom call: {headers} lacks the headers of its FFI")
        return []
    compiler = [*cxx(), *KERNEL_FLAGS, "-fvisibility=default", f"-isystem{headers}"]
    commands = objects(folder, [*CSRC.glob("ffi/*.cpp")], compiler)
    library = folder.absolute() / "libfusedopt_jax.so"
    command = [*cxx(), "-shared", *compile_objects(commands), *linking, "-o", str(library)]
    subprocess.run(command, check=True)
    return [library]


def build_for_tensorflow(folder: Path, library: Path) -> tuple[list[Path], str | None]:
    """The library of TensorFlow's op, and the version of TensorFlow, where it is installed."""
    if find_spec("tensorflow") is None:
        return [], None
    script, made = str(CSRC / "build_op.py"), folder.absolute() / "tensorflow"
    command = [sys.executable, script, str(made), str(library), "--rpath", "$ORIGIN"]
    built = subprocess.run(command, capture_output=True, text=True)  # beside torch in no process
    if built.returncode != 0:
        say(f"building without TensorFlow's op: {built.stderr[-2000:]}")
        return [], None
    return [made / "libfusedopt_tensorflow.so"], built.stdout.split()[-1]


def build_kernels(
    folder: Path, compiling: list[str], linking: list[str]
) -> tuple[Path, list[str], str | None]:
    """`link_library`'s results, and why there are no CUDA kernels, if so."""
    nvcc, no_cuda = choose_cuda()
    say(f"building the CPU kernels; CUDA kernels: {no_cuda or f'with {nvcc}'}")
    if nvcc:
        say("CUDA kernels take minutes to compile; TORCH_CUDA_ARCH_LIST names fewer GPUs")
    libraries = linking.copy()
    with_cuda = f"-DFUSEDOPT_WITH_CUDA={int(nvcc is not None)}"
    compiler = [*cxx(), *KERNEL_FLAGS, *compiling, with_cuda]
    if nvcc:
        root = cuda_root(nvcc)
        compiler.append(f"-I{root / 'include'}")
        libraries += [static_runtime(root), "-ldl", "-lrt", "-lpthread"]
    commands = objects(folder, kernel_sources(), compiler)
    if nvcc:
        commands |= objects(folder, [*CSRC.glob("cuda/*.cu")], nvcc_command(nvcc))
    return *link_library(folder, commands, libraries), no_cuda


def make_build_ext(base: type[build_ext], torch: str | None) -> type[build_ext]:
    class BuildWithKernels(base):
        """Builds the kernels' library, and then the extension, which links to it."""

        def run(self) -> None:
            check_compiler(python=torch is not None)
            compiling, linking = openmp()
            folder = Path(self.build_temp)
            library, arguments, no_cuda = build_kernels(folder, compiling, linking)
            for extension in self.extensions:
                extension.extra_compile_args = [*CXX_FLAGS, *compiling, *BINDING_INCLUDES]
                extension.extra_link_args += [*linking, *arguments]
                extension.depends.append(str(library))
            super().run()
            package = ROOT / "fusedopt" if self.inplace else Path(self.build_lib) / "fusedopt"
            package.mkdir(parents=True, exist_ok=True)
            op, tensorflow = build_for_tensorflow(folder, library)
            remove_old(package, binding=not self.extensions)
            for it in [library, *build_for_jax(folder, arguments), *op]:
                shutil.copy(it, package)
            missing = None if torch else NO_TORCH
            write_record(
                package, torch=torch, no_cuda=no_cuda, missing=missing, tensorflow=tensorflow
            )
            say("built" + (f", without CUDA kernels: {no_cuda}" if no_cuda else ""))
            if missing:
                say(f"built WITHOUT the extension for torch: {missing}")

        def build_extensions(self) -> None:
            if not getattr(self, "use_ninja", True):
                compile_at_once(self.compiler)
            super().build_extensions()

    return BuildWithKernels


def remove_old(package: Path, binding: bool) -> None:
    """Removes what an earlier build left in place, and this one may not have made.

    The record of this build would not be true of it.
    """
    names = [f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"] if binding else []
    for name in [*names, "libfusedopt_jax.so", "libfusedopt_tensorflow.so"]:
        (package / name).unlink(missing_ok=True)


class BuildAnew(build):
    """Empties the folder that is packed, where an earlier build may have left other files."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


def compile_at_once(compiler) -> None:
    """Without ninja, setuptools compiles one source after another: here, MAX_JOBS at once."""

    def compile(sources, output_dir=None, macros=None, include_dirs=None, debug=0,
                extra_preargs=None, extra_postargs=None, depends=None):  # fmt: skip
        _, outputs, postargs, options, builds = compiler._setup_compile(
            output_dir, macros, include_dirs, sources, depends, extra_postargs
        )
        arguments = compiler._get_cc_args(options, debug, extra_preargs)
        with ThreadPoolExecutor(jobs_at_once()) as pool:
            for done in [
                pool.submit(compiler._compile, output, *build, arguments, postargs, options)
                for output, build in builds.items()
            ]:
                done.result()
        return outputs

    compiler.compile = compile


class BinaryDistribution(Distribution):
    """A distribution of one platform, even if the kernels' library is all that is compiled."""

    def has_ext_modules(self) -> bool:
        return True


def make_build_py(missing: str) -> type[build_py]:
    class BuildPurePython(build_py):
        """Leaves a word of why there is no extension."""

        def run(self) -> None:
            super().run()
            say(f"installing WITHOUT the compiled kernels: {missing}. Steps will run on torch's "
                "own functions; `python -m fusedopt` shows what is built")  # fmt: skip
            if not self.editable_mode:
                write_record(Path(self.build_lib) / "fusedopt", missing=missing)

    return BuildPurePython


class BuildPyWithSources(build_py):
    """Adds what fusedopt/core/first_build.py compiles for a torch or TensorFlow of later."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for path in (path for folder in BINDING_NEEDS for path in CSRC.glob(folder)):
                copy = Path(self.build_lib, "fusedopt", path)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, copy)


def write_record(package: Path, **record: str | None) -> Path:
    """Says beside the extension what it is, for fusedopt/core/extension.py."""
    extension = runpy.run_path("fusedopt/core/extension.py")
    record["sources"] = extension["fingerprint"](ROOT.resolve())
    path = package / extension["RECORD"]
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path


def why_pure_python() -> str | None:
    """Why no extension is to be built, if so."""
    if os.environ.get("FUSEDOPT_PURE_PYTHON") == "1":
        return "FUSEDOPT_PURE_PYTHON=1 was set"
    if sys.platform == "win32":
        return "no build for Windows exists yet"
    if shutil.which(cxx()[0]) is None:
        return f"no C++ compiler {cxx()[0]!r} was found; install g++ or clang++, or set CXX"
    return None


def build_options() -> dict:
    """setup()'s arguments for what is compiled; nothing is without a compiler."""
    if missing := why_pure_python():
        return {"cmdclass": {"build": BuildAnew, "build_py": make_build_py(missing)}}
    if find_spec("torch") is None:
        extensions, command = [], make_build_ext(build_ext, None)
    else:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension

        extensions = [make_extension(CppExtension)]
        command = make_build_ext(BuildExtension, str(torch.__version__))
    return {
        "ext_modules": extensions,
        "cmdclass": {"build": BuildAnew, "build_ext": command, "build_py": BuildPyWithSources},
        "distclass": BinaryDistribution,
    }


if __name__ == "__main__":
    os.chdir(ROOT)
    setup(**build_options())
