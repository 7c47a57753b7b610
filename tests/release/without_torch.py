"""Installs this source folder where there is no torch, and takes a step there. By hand, in minutes.

    python tests/release/without_torch.py

It makes a virtual environment with NumPy and setuptools alone, from the package index.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
STEP = """if True:
    import sys
    import numpy as np
    import fusedopt
    from fusedopt import arrays

    assert "torch" not in sys.modules
    param, grad = np.array([1.0, -2.0, 3.0]), np.array([3.0, 0.0, 4.0])
    optimizer = arrays.AdamW([param], lr=0.1, weight_decay=0.5, max_grad_norm=1.0)
    optimizer.step([grad])
    assert optimizer.grad_norm == 5.0
    expected = np.array([1.0, -2.0, 3.0]) * (1 - 0.1 * 0.5) - 0.1 * np.array([1.0, 0.0, 1.0])
    assert np.allclose(param, expected, atol=1e-6), param
    optimizer.step([grad * np.nan])
    assert optimizer.skipped_steps == 1 and np.allclose(param, expected, atol=1e-6)
    try:
        fusedopt.FusedAdamW
    except ImportError as error:
        assert "fusedopt.FusedAdamW needs torch" in str(error), error
    else:
        raise AssertionError("there is torch here")
    print(fusedopt.__file__, param)
"""


def run(*command: object, cwd: Path) -> None:
    print("+", *command, flush=True)
    # PYTHONPATH would show the source folder, or somebody's torch.
    environment = {name: it for name, it in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([*map(str, command)], cwd=cwd, env=environment, check=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        tree, environment = Path(folder, "tree"), Path(folder, "venv")
        tree.mkdir()
        for name in ("csrc", "fusedopt"):
            built = shutil.ignore_patterns("*.so", "__pycache__", "_build.json")
            shutil.copytree(ROOT / name, tree / name, ignore=built)
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, tree)
        venv.create(environment, with_pip=True)
        python = environment / "bin/python"
        run(python, "-m", "pip", "install", "--quiet", "setuptools>=77", "numpy", cwd=tree)
        options = ("--quiet", "--no-build-isolation", "--no-deps")
        run(python, "-m", "pip", "install", *options, ".", cwd=tree)
        run(python, "-W", "error", "-c", STEP, cwd=Path(folder))
    print("passed")


if __name__ == "__main__":
    sys.exit(main())
