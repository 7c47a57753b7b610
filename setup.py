"""Builds fusedopt._C: the CPU kernels always, the CUDA kernels where there is an nvcc.

Environment:
    FUSEDOPT_CUDA=0 or 1      leave the CUDA kernels out, or insist on them
    FUSEDOPT_PURE_PYTHON=1    build no extension at all
    TORCH_CUDA_ARCH_LIST      architectures as torch's own extensions take them: "8.0;9.0+PTX"
    CUDA_HOME                 where to look for nvcc first
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
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
NVCC_FLAGS = (
    "-std=c++17 -O3 --expt-relaxed-constexpr -fmad=false -prec-div=true -prec-sqrt=true -ftz=false"
).split()


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
    flags = []
    for name in names:
        number = name.removesuffix("+PTX").replace(".", "")
        if not re.fullmatch(r"\d+[af]?", number):
            sys.exit(f"TORCH_CUDA_ARCH_LIST: {name!r} is not like 9.0 or 9.0+PTX")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


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


def compile_cuda(nvcc: Path, folder: Path) -> str:
    """csrc/cuda/passes.cu as an object. It includes nothing of torch, so that any torch will do."""
    output = folder / "cuda_passes.o"
    command = [str(nvcc), *NVCC_FLAGS, *architecture_flags(nvcc), "--threads=0", "-Xcompiler=-fPIC",
               "-Xptxas=-v", "-c", str(CSRC / "cuda/passes.cu"), "-o", str(output)]  # fmt: skip
    stamp = folder / "cuda_passes.command"
    inputs = [path for path in CSRC.rglob("*") if path.suffix in {".h", ".cuh", ".cu"}]
    newest = max(path.stat().st_mtime for path in inputs)
    if stamp.exists() and stamp.read_text() == repr(command) and output.stat().st_mtime > newest:
        return str(output)
    folder.mkdir(parents=True, exist_ok=True)
    print(" ".join(command), flush=True)
    report = subprocess.run(command, capture_output=True, text=True)
    (folder / "cuda_resources.txt").write_text(report.stderr)  # registers and spills, per kernel
    if report.returncode != 0:
        sys.exit(report.stderr)
    stamp.write_text(repr(command))
    return str(output)


def make_extension():
    from torch.utils.cpp_extension import CppExtension

    extension = CppExtension(
        "fusedopt._C",
        sorted(map(str, [*CSRC.glob("*.cpp"), *CSRC.glob("cpu/*.cpp")])),
        extra_compile_args=CXX_FLAGS,
        extra_link_args=["-fopenmp"],
    )
    extension.depends = sorted(str(path) for path in CSRC.rglob("*.*"))
    return extension


def make_build_ext():
    from torch.utils.cpp_extension import BuildExtension

    class BuildWithCuda(BuildExtension):
        """Torch's build, with the CUDA kernels compiled beforehand and linked in."""

        def build_extensions(self) -> None:
            nvcc = find_nvcc()
            print(f"fusedopt: CUDA kernels: {f'built with {nvcc}' if nvcc else 'left out'}")
            for extension in self.extensions:
                extension.define_macros.append(("FUSEDOPT_WITH_CUDA", "1" if nvcc else "0"))
                if nvcc:
                    root = cuda_root(nvcc)
                    extension.include_dirs.append(str(root / "include"))
                    extension.extra_objects.append(compile_cuda(nvcc, Path(self.build_temp)))
                    extension.extra_link_args += [static_runtime(root), "-ldl", "-lrt", "-lpthread"]
            super().build_extensions()

    return BuildWithCuda


def build_options() -> dict:
    """setup()'s arguments for the extension; none of them without a compiler."""
    compiler = os.environ.get("CXX", "c++").split()[0]
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
