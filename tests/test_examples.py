"""An example without its library says how to install it."""

from __future__ import annotations

import subprocess
import sys

import pytest
from trainers import EXAMPLES


@pytest.mark.parametrize(
    ("name", "library", "words"),
    [
        ("lightning_digits", "pytorch_lightning", "pip install pytorch-lightning scikit-learn"),
        ("accelerate_gru", "accelerate", "pip install accelerate scikit-learn"),
        ("transformers_gpt2", "transformers", "pip install transformers accelerate"),
        ("train_digits", "sklearn", "pip install numpy scikit-learn matplotlib tqdm"),
        ("exploding_rnn", "tqdm", "pip install numpy scikit-learn matplotlib tqdm"),
    ],
)
def test_an_example_without_its_library_says_how_to_install_it(name, library, words):
    script = f"""
import runpy, sys
sys.modules[{library!r}] = None
sys.path.insert(0, {str(EXAMPLES)!r})
sys.argv = [{f"{name}.py"!r}, "--help"]
runpy.run_path({str(EXAMPLES / f"{name}.py")!r}, run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"{name}.py needs {library}, which isn't installed: ")
    assert done.stderr.endswith(f"{words}\n")
