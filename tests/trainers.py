"""Helpers of the tests that train with Lightning, Hugging Face's Trainer and Accelerate."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

# In 16 bits, roundings that differ in the last float32 bit soon differ in a 16-bit one.
ROUNDED = 1e-3

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

MARKS = [
    pytest.mark.usefixtures("one_thread", "same_environment"),
    # Lightning walks batches with a function that torch deprecated.
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    # transformers before 5 asks for autocast by its old name.
    pytest.mark.filterwarnings("ignore:`torch.cpu.amp.autocast.args....` is deprecated"),
    # Lightning advises: loaders of small data have no workers here.
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
]


def example(name: str, library: str) -> ModuleType:
    """Imported in the test that needs it, as its library takes seconds."""
    pytest.importorskip(library)
    pytest.importorskip("sklearn")
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    return importlib.import_module(name)


def params_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]


def numbers_after(word: str, printed: str) -> list[float]:
    """The number after a word in each line that an example prints."""
    return [float(number) for number in re.findall(rf"{word}\W+([\d.]+)", printed)]


def digit_batches(poisoned: int | None = None, count: int = 12, size: int = 16) -> DataLoader:
    """The first digits; a nan in the batch of this number."""
    from digits_data import load_digits

    digits = load_digits()
    images, labels = digits.train_images[: count * size].clone(), digits.train_labels
    if poisoned is not None:
        images[poisoned * size, 0, 0, 0] = torch.nan
    return DataLoader(TensorDataset(images, labels[: count * size]), size)
