"""Builds the extension with its CUDA kernels running on the CPU: see cuda_runtime.h in this folder.

    python tests/emulator/build.py [emulated | sanitized | racecheck]

The module is called _C_emulated; _C_sanitized with AddressSanitizer and UBSan in it, _C_racecheck
with ThreadSanitizer. These two are imported only by a Python with their runtimes preloaded
(`make sanitize`, `make racecheck`).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import runpy
import sysconfig
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parent.parent.parent
BUILD = Path("build/emulator")

FLAGS = [
    "-O1",
    "-g0",
    "-fopenmp",
    "-ffp-contract=off",
    "-fvisibility=hidden",
    "-Werror=switch",
    "-Wno-unknown-pragmas",
    "-DFUSEDOPT_ONE_ISA",
    "-DFUSEDOPT_WITH_CUDA=1",
    "-DFUSEDOPT_API=",
    "-DFUSEDOPT_CUDA_DEVICE=c10::kCPU",
]
VARIANTS = {
    "emulated": [],
    # AddressSanitizer finds by itself what the checks left out would find.
    "sanitized": [
        "-g1",
        "-fsanitize=address,undefined",
        "-fno-sanitize=null,object-size,vptr,nonnull-attribute,returns-nonnull-attribute",
        "-fno-sanitize-recover=undefined",
    ],
    "racecheck": ["-g1", "-fsanitize=thread"],
}


def build(variant: str) -> None:
    """Compiles what has changed."""
    import setuptools
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    os.chdir(ROOT)
    setup = runpy.run_path("setup.py")
    name = f"_C_{variant}"
    extra = VARIANTS[variant]
    include = ROOT / "tests/emulator"
    compiler = [*setup["cxx"](), "-std=c++20", "-fPIC", *FLAGS, *extra, *setup["INCLUDES"]]
    compiler += [f"-I{include}", "-xc++"]
    kernels = [*setup["kernel_sources"](), *Path("csrc/cuda").glob("*.cu")]
    commands = setup["objects"](BUILD / name, kernels, compiler)
    sources = [*setup["binding_sources"](), Path("tests/emulator/controls.cpp")]
    extension = CppExtension(
        name,
        sorted(map(str, sources)),
        include_dirs=[str(include)],
        extra_compile_args=[
            *FLAGS,
            *extra,
            *setup["BINDING_INCLUDES"],
            "-include",
            str(include / "device_key.h"),
        ],
        extra_objects=setup["compile_objects"](commands),
        extra_link_args=["-fopenmp", *extra],
    )
    extension.depends = [
        *(str(path) for top in ("csrc", "tests/emulator") for path in Path(top).rglob("*.*")),
        *extension.extra_objects,
    ]
    setuptools.setup(
        name=name,
        packages=[],
        ext_modules=[extension],
        cmdclass={"build_ext": BuildExtension},
        script_args=[
            "--quiet",
            "build_ext",
            f"--build-lib={BUILD}",
            f"--build-temp={BUILD / name}",
        ],
    )


def load(variant: str) -> ModuleType:
    """Imports what has been built."""
    name = f"_C_{variant}"
    path = ROOT / BUILD / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not path.exists():
        raise ImportError(f"{path} is missing: python tests/emulator/build.py {variant}")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variant", nargs="?", default="emulated", choices=VARIANTS)
    build(parser.parse_args().variant)
