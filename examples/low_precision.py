"""The same training in fewer bytes: three ways to train a bfloat16 network, on one picture.

Usage:
    python examples/low_precision.py                 # some 20 seconds
    python examples/low_precision.py --steps 4000

It needs `pip install scikit-learn matplotlib`. The network classifies scikit-learn's images of
digits. It computes in bfloat16 in all three runs, from the same first weights and on the same
batches; only the optimizer's formats differ:

* float32: master_weights="exact", state_dtype=torch.float32, which gives the weights of a float32
  optimizer to the bit, in 12 bytes per parameter;
* 24bit + 8bit: master_weights="24bit", state_dtype="8bit", in 5.1 bytes;
* naive bfloat16: neither, in 6 bytes. Most of its late updates are smaller than half a unit of a
  weight's last bit, and are lost.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from needs import needs
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional

with needs("scikit-learn", "matplotlib"):
    import matplotlib
    from sklearn.datasets import load_digits

    matplotlib.use("Agg")  # draws to a file; needs no screen
    import matplotlib.pyplot as plt

import fusedopt

WAYS: dict[str, dict[str, Any]] = {
    "float32": {"master_weights": "exact", "state_dtype": torch.float32},
    "24bit + 8bit": {"master_weights": "24bit", "state_dtype": "8bit"},
    "naive bfloat16": {},
}
COLORS = ("#0072b2", "#009e73", "#d55e00")  # blue, green and vermilion: all can tell them apart
BATCH, LR, EVERY = 128, 2e-3, 25


@dataclass
class Run:
    """The losses of one run."""

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)  # over all images, by the trained weights


def images() -> tuple[Tensor, Tensor]:
    pixels, labels = load_digits(return_X_y=True)
    return torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels)


def network(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    layers = [torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 128)]
    return torch.nn.Sequential(*layers, torch.nn.ReLU(), torch.nn.Linear(128, 10)).bfloat16()


@torch.no_grad()
def loss_of(model: torch.nn.Module, weights: dict[str, Tensor], x: Tensor, y: Tensor) -> float:
    """The loss over all images in float32, so that it shows the weights and no rounding."""
    return functional.cross_entropy(functional_call(model, weights, (x,)), y).item()


def train(formats: dict[str, Any], seed: int, steps: int) -> Run:
    """Trains a network. The learning rate falls to 0, along half a cosine."""
    x, y = images()
    model = network(seed)
    optimizer = fusedopt.FusedAdamW(
        model.named_parameters(), lr=LR, weight_decay=0.01, max_grad_norm=1.0, **formats
    )
    order = torch.Generator().manual_seed(seed)
    run = Run()
    for step in range(steps + 1):
        if step % EVERY == 0 or step == steps:
            run.steps.append(step)
            run.losses.append(loss_of(model, fusedopt.master_weights(optimizer), x, y))
        batch = torch.randint(len(y), (BATCH,), generator=order)
        for group in optimizer.param_groups:
            group["lr"] = LR * (1 + math.cos(math.pi * step / steps)) / 2
        loss = functional.cross_entropy(model(x[batch].bfloat16()).float(), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return run


def plot(runs: dict[str, Run], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for (name, run), color in zip(runs.items(), COLORS, strict=True):
        axes.plot(run.steps, run.losses, color=color, label=f"{name}: {run.losses[-1]:.4f}")
    axes.set(yscale="log", xlabel="step", ylabel="loss over all images")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="bfloat16 training with fewer bytes")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("low_precision.png"))
    arguments = parser.parse_args(argv)
    runs = {}
    for name, formats in WAYS.items():
        runs[name] = train(formats, arguments.seed, arguments.steps)
        print(f"{name:16} loss {runs[name].losses[-1]:.5f}")
    plot(runs, arguments.out)
    print(f"{arguments.out} shows them")


if __name__ == "__main__":
    main()
