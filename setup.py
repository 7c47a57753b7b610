"""Builds the kernels' library, and fusedopt._C, torch's binding to it.

The CPU kernels are always built, the CUDA kernels where there is an nvcc.

Environment:
    FUSEDOPT_CUDA=0 or 1      leave the CUDA kernels out, or insist on them
    FUSEDOPT_PURE_PYTHON=1    build no extension at all
    TORCH_CUDA_ARCH_LIST      architectures as torch's own extensions take them: "8.0;9.0+PTX"
    CUDA_HOME                 where to look for nvcc first
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
CSRC = Path("csrc")
DEFAULT_ARCHITECTURES = ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]

# No contraction into FMA and no fast-math: every operation rounds once, on every backend. Neither
# errno nor floating-point traps are used, and both would keep loops from being vectorized.
# -g0: Python asks for debug information, most of which is that of torch's headers.
CXX_FLAGS = (
    "-O3 -g0 -fopenmp -ffp-contract=off -fno-math-errno -fno-trapping-math -fvisibility=hidden"
).split()
INCLUDES = ["-Icsrc"]  # the kernels' own headers; they include nothing of torch
# Quoted includes alone: csrc/torch is not to stand in for <torch/...>.
BINDING_INCLUDES = ["-iquote", str(ROOT.resolve() / CSRC)]
KERNEL_FLAGS = ["-std=c++17", "-fPIC", *CXX_FLAGS, *INCLUDES]
NVCC_FLAGS = (
    "-std=c++17 -O3 --expt-relaxed-constexpr -fmad=false -prec-div=true -prec-sqrt=true -ftz=false"
).split()


def cxx() -> list[str]:
    return shlex.split(os.environ.get("CXX", "c++"))


def find_nvcc() -> Path | None:
    wanted = os.environ.get("FUSEDOPT_CUDA") or None
    if wanted not in (None, "0", "1"):
        sys.exit(f"FUSEDOPT_CUDA is {wanted!r}; it takes 0 or 1")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    nvcc = shutil.which("nvcc", path=f"{home}/bin") or shutil.which("nvcc")
    if nvcc is None and wanted == "1":
        sys.exit("FUSEDOPT_CUDA=1 asks for the CUDA kernels, but there is no nvcc: set CUDA_HOME")
    return Path(nvcc) if nvcc else None


def architecture_flags(nvcc: Path) -> list[str]:
    """What TORCH_CUDA_ARCH_LIST says, else every common architecture that this nvcc knows."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if asked:
        names = [name for name in re.split(r"[;,\s]+", asked) if name]
    else:
        listing = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
        known = set(re.findall(r"compute_(\d+)", listing))
        names = [name for name in DEFAULT_ARCHITECTURES if name.replace(".", "") in known]
        if not names:
            sys.exit(
                f"{nvcc} knows none of {', '.join(DEFAULT_ARCHITECTURES)}: set FUSEDOPT_CUDA=0"
            )
        names[-1] += "+PTX"
    codes: dict[str, list[str]] = {}  # by the architecture whose PTX they are made of
    for name in names:
        number = name.removesuffix("+PTX").replace(".", "")
        if not re.fullmatch(r"\d+[af]?", number):
            sys.exit(f"TORCH_CUDA_ARCH_LIST: {name!r} is not like 9.0 or 9.0+PTX")
        # Of one generation, the first one's serves all: a third of the work is done once for them.
        older = (it for it in codes if it[:-1] == number[:-1] and it.isdigit() and it <= number)
        codes.setdefault(next(older, number), []).append(f"sm_{number}")
        if name.endswith("+PTX"):
            codes.setdefault(number, []).append(f"compute_{number}")
    return [f"-gencode=arch=compute_{ptx},code=[{','.join(code)}]" for ptx, code in codes.items()]


def cuda_root(nvcc: Path) -> Path:
    """The toolkit's folder, as nvcc itself sees it: nvcc may be a link or a wrapper."""
    dry_run = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True
    )
    top = re.search(r"^#\$ _?TOP=(.*)$", dry_run.stderr, re.MULTILINE)
    return Path(top[1]).resolve() if top else nvcc.resolve().parent.parent


def nvcc_command(nvcc: Path) -> list[str]:
    threads = max(1, jobs_at_once() // 4)  # at once per object, of which there are some more
    return [str(nvcc), *NVCC_FLAGS, *INCLUDES, *architecture_flags(nvcc), f"--threads={threads}",
            "-Xcompiler=-fPIC,-ffp-contract=off", "-Xptxas=-v"]  # fmt: skip


def static_runtime(root: Path) -> str:
    for folder in (root / "lib64", root / "lib", *root.glob("targets/*/lib")):
        if (folder / "libcudart_static.a").exists():
            return str(folder / "libcudart_static.a")
    sys.exit(
        f"no libcudart_static.a under {root}: install CUDA's development files, or FUSEDOPT_CUDA=0"
    )


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

    def make(output: Path) -> None:
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

    for folder in {output.parent for output in commands}:
        folder.mkdir(parents=True, exist_ok=True)
    outdated = [output for output, command in commands.items() if not is_current(output, command)]
    with ThreadPoolExecutor(jobs_at_once()) as pool:
        list(pool.map(make, outdated))
    if errors:
        sys.exit("\n".join(errors))
    return list(map(str, commands))


def jobs_at_once() -> int:
    return int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))


def binding_sources() -> list[Path]:
    return [*CSRC.glob("torch/*.cpp")]


def kernel_sources() -> list[Path]:
    return [*CSRC.glob("*.cpp"), *CSRC.glob("core/*.cpp"), *CSRC.glob("cpu/*.cpp")]


def make_extension():
    from torch.utils.cpp_extension import CppExtension

    extension = CppExtension(
        "fusedopt._C",
        sorted(map(str, binding_sources())),
        extra_compile_args=[*CXX_FLAGS, *BINDING_INCLUDES],
        extra_link_args=["-fopenmp"],
    )
    extension.depends = sorted(str(path) for path in CSRC.rglob("*.*"))
    return extension


def link_library(
    folder: Path, commands: dict[Path, list[str]], libraries: list[str]
) -> tuple[Path, list[str]]:
    """The kernels as a shared library of their own, and the arguments that link to it."""
    # A process takes two libraries of one name for the same: a build beside another has a suffix.
    name = f"fusedopt_kernels{os.environ.get('FUSEDOPT_LIBRARY_SUFFIX', '')}"
    library = folder.absolute() / f"lib{name}.so"
    command = [*cxx(), "-shared", "-fopenmp", *compile_objects(commands), *libraries]
    subprocess.run([*command, "-o", str(library)], check=True)
    return library, [f"-L{library.parent}", f"-l{name}", "-Wl,-rpath,$ORIGIN"]


def make_build_ext():
    from torch.utils.cpp_extension import BuildExtension

    class BuildWithKernels(BuildExtension):
        """Torch's build of the binding, which links to the kernels' library beside it."""

        def build_extensions(self) -> None:
            nvcc = find_nvcc()
            print(f"fusedopt: CUDA kernels: {f'built with {nvcc}' if nvcc else 'left out'}")
            folder = Path(self.build_temp)
            compiler = [*cxx(), *KERNEL_FLAGS, f"-DFUSEDOPT_WITH_CUDA={int(nvcc is not None)}"]
            libraries = []
            if nvcc:
                root = cuda_root(nvcc)
                compiler.append(f"-I{root / 'include'}")
                libraries = [static_runtime(root), "-ldl", "-lrt", "-lpthread"]
            commands = objects(folder, kernel_sources(), compiler)
            if nvcc:
                commands |= objects(folder, [*CSRC.glob("cuda/*.cu")], nvcc_command(nvcc))
            library, arguments = link_library(folder, commands, libraries)
            (extension,) = self.extensions
            extension.extra_link_args += arguments
            extension.depends.append(str(library))
            super().build_extensions()
            self.library = shutil.copy(library, Path(self.build_lib) / "fusedopt")

        def copy_extensions_to_source(self) -> None:  # where it is built in place
            super().copy_extensions_to_source()
            shutil.copy(self.library, ROOT / "fusedopt")

    return BuildWithKernels


def build_options() -> dict:
    """setup()'s arguments for the extension; none of them without a compiler."""
    compiler = cxx()[0]
    if os.environ.get("FUSEDOPT_PURE_PYTHON") == "1" or shutil.which(compiler) is None:
        print(
            f"fusedopt: installing WITHOUT the compiled kernels (no C++ compiler {compiler!r}, or "
            "FUSEDOPT_PURE_PYTHON=1): every step will run in plain torch, correct but slow",
            file=sys.stderr,
        )
        return {}
    try:
        import torch  # noqa: F401
    except ImportError:
        sys.exit(
            "fusedopt is compiled against the torch that is installed, and there is none here: "
            "pip install torch, then pip install --no-build-isolation ."
        )
    return {"ext_modules": [make_extension()], "cmdclass": {"build_ext": make_build_ext()}}


if __name__ == "__main__":
    os.chdir(ROOT)
    setup(**build_options())
