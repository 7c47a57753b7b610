"""`import fusedopt` loads nothing else; the first use of a public name loads torch, or says so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import fusedopt

ROOT = Path(__file__).parent.parent


def run(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_without_torch_only_the_use_of_a_name_fails():
    done = run("""if True:
        import sys
        sys.modules["torch"] = None
        import fusedopt
        assert {"FusedAdamW", "clip", "__version__"} <= {*dir(fusedopt)}
        assert issubclass(fusedopt.NonFiniteGradientError, RuntimeError)
        for name in {*fusedopt.__all__} - {"NonFiniteGradientError"}:
            try:
                getattr(fusedopt, name)
            except ImportError as error:
                assert f"fusedopt.{name} needs torch, which is not installed" in str(error), error
                assert "`pip install torch`" in str(error)
            else:
                raise AssertionError(name)
        try:
            from fusedopt import FusedAdamW
        except ImportError as error:
            print(error)
    """)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("fusedopt.FusedAdamW needs torch")


def test_the_package_itself_imports_no_other_module_of_ours():
    done = run("""if True:
        import sys
        import fusedopt
        assert "torch" not in sys.modules
        assert not [name for name in sys.modules if name.startswith("fusedopt.")]
    """)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("first", ["reference", "core.backends", "optimizers.sgd", "clip"])
def test_any_module_may_be_imported_first(first):
    """A class then knows the states of all rules, whichever was imported."""
    done = run(f"""if True:
        import fusedopt.{first}
        from fusedopt import *
        from fusedopt.reference import all_state_names
        assert {{"momentum_buffer", "exp_avg", "acc_delta", "eta"}} <= {{*all_state_names()}}
        assert FusedSGD.__module__ == "fusedopt.optimizers.sgd"
    """)
    assert done.returncode == 0, done.stderr


def test_every_public_name_exists_and_no_other():
    for name in fusedopt.__all__:
        assert getattr(fusedopt, name) is not None
    with pytest.raises(AttributeError, match="module 'fusedopt' has no attribute 'FusedAdamX'"):
        _ = fusedopt.FusedAdamX  # pyright: ignore[reportAttributeAccessIssue]
