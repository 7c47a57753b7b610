"""The compilers that setup.py builds with: which are here, and what to do where one isn't."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from importlib.util import find_spec
from pathlib import Path

PROGRAM = "#include <vector>\nint main() { return std::vector<int>(1)[0]; }\n"

# No contraction into FMA and no fast-math: every operation rounds once, on every backend. Neither
# errno nor floating-point traps are used, and both would keep loops from being vectorized.
# -g0: Python asks for debug information, most of which is that of torch's headers.
CXX_FLAGS = (
    "-O3 -g0 -ffp-contract=off -fno-math-errno -fno-trapping-math -fvisibility=hidden"
    " -Werror=switch"
).split()
# Cards of 8.9 run the code of 8.6: nvcc makes the same instructions of the kernels for both.
DEFAULT_ARCHITECTURES = ["7.5", "8.0", "8.6", "9.0", "10.0", "12.0"]


def cxx() -> list[str]:
    return shlex.split(os.environ.get("CXX", "c++"))


def say(text: str) -> None:
    """To the log of the build and to the terminal: pip shows the log only with -v."""
    print(f"fusedopt: {text}", file=sys.stderr, flush=True)
    if not sys.stderr.isatty():
        with contextlib.suppress(OSError), open("/dev/tty", "w") as terminal:
            print(f"\nfusedopt: {text}", file=terminal)


def compiler_error(*flags: str) -> str | None:
    """What the compiler says of a small program; None if it makes one."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "program.cpp")
        source.write_text(PROGRAM)
        command = [*cxx(), "-std=c++17", *flags, str(source), "-o", f"{folder}/program"]
        done = subprocess.run(command, capture_output=True, text=True)
    return None if done.returncode == 0 else f"{shlex.join(command)}\n{done.stdout}{done.stderr}"


def why_not_compile(python: bool = True) -> str | None:
    """Why nothing can be compiled here, and what to do; None if a small program compiles.

    `python`: whether Python's headers are needed.
    """
    if shutil.which(cxx()[0]) is None:
        return f"There is no C++ compiler {cxx()[0]!r}. Install g++ or clang++, or set CXX."
    if error := compiler_error():
        return f"The C++ compiler makes no program:\n{error}\nInstall g++ or clang++, or set CXX."
    if python and not (header := Path(sysconfig.get_path("include"), "Python.h")).exists():
        return f"There is no {header}. Install Python's headers (python3-dev)."
    return None


def check_compiler(python: bool = True) -> None:
    """Ends the build where nothing can be compiled, with a word of what to do."""
    if needed := why_not_compile(python):
        sys.exit(
            f"fusedopt can't be compiled. {needed} FUSEDOPT_PURE_PYTHON=1 installs it without "
            "compiled kernels: its steps then run on torch's own functions."
        )


def openmp() -> tuple[list[str], list[str]]:
    """Flags for the compiler and the linker. Without OpenMP, the kernels run in one thread."""
    choices = [(["-fopenmp"], ["-fopenmp"])]
    if sys.platform == "darwin":  # Apple's clang, with Homebrew's libomp
        choices.append((["-Xpreprocessor", "-fopenmp"], ["-lomp"]))
    for compiling, linking in choices:
        if compiler_error(*compiling, *linking) is None:
            return compiling, linking
    say("this compiler has no OpenMP: the CPU kernels will run in one thread")
    return [], []


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


def has_gpu() -> bool:
    smi = shutil.which("nvidia-smi")
    if smi is not None:
        return b"GPU " in subprocess.run([smi, "-L"], capture_output=True).stdout
    if find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


def choose_cuda() -> tuple[Path | None, str | None]:
    """The nvcc to build CUDA kernels with, or None and why they are left out."""
    nvcc, wanted = find_nvcc(), os.environ.get("FUSEDOPT_CUDA")
    if wanted == "0":
        return None, "FUSEDOPT_CUDA=0 left them out"
    if nvcc is None:
        return None, "no nvcc was found. To build them, set CUDA_HOME and build again"
    if wanted != "1" and not has_gpu():
        return None, f"there is no GPU here. To build them with {nvcc}, set FUSEDOPT_CUDA=1"
    return nvcc, None


def shares_ptx(older: str, number: str) -> bool:
    """Whether code for the architecture `number` can be made of the PTX of `older`, and is as good.

    PTX takes nvcc a third of the time. The kernels use new instructions of 8.0 (conversions to 16
    bits); from 10.0 on, nvcc itself makes other PTX.
    """
    firsts = (80, 100)
    both_whole = older.isdigit() and number.isdigit()
    return (
        both_whole
        and int(older) <= int(number)
        and not any(int(older) < first <= int(number) for first in firsts)
    )


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
        older = (it for it in codes if shares_ptx(it, number))
        ptx = next(older, number)
        codes.setdefault(ptx, []).append(f"sm_{number}")
        if name.endswith("+PTX"):
            codes[ptx].append(f"compute_{ptx}")
    return [f"-gencode=arch=compute_{ptx},code=[{','.join(code)}]" for ptx, code in codes.items()]


def cuda_root(nvcc: Path) -> Path:
    """The toolkit's folder, as nvcc itself sees it: nvcc may be a link or a wrapper."""
    dry_run = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True
    )
    top = re.search(r"^#\$ _?TOP=(.*)$", dry_run.stderr, re.MULTILINE)
    return Path(top[1]).resolve() if top else nvcc.resolve().parent.parent


def static_runtime(root: Path) -> str:
    for folder in (root / "lib64", root / "lib", *root.glob("targets/*/lib")):
        if (folder / "libcudart_static.a").exists():
            return str(folder / "libcudart_static.a")
    sys.exit(
        f"no libcudart_static.a under {root}: install CUDA's development files, or FUSEDOPT_CUDA=0"
    )


def jobs_at_once() -> int:
    return int(os.environ.get("MAX_JOBS") or usable_cores())


def usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
