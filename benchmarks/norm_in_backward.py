"""Whether gradients are better measured in backward, while they are in a cache, than in the step.

    python benchmarks/norm_in_backward.py

Hooks measure each gradient as soon as backward has accumulated it. Printed are, per training step
of a transformer: the time that the hooks take, and the time that a clipped step takes more than an
unclipped one, which is all that it could save.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import torch
from torch import Tensor, nn

import fusedopt

BATCH, LENGTH = 4, 32


class Stopwatch:
    """Adds up the seconds that its calls take."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def measure(self, grad: Tensor) -> None:
        start = time.perf_counter()
        fusedopt.get_total_norm([grad])
        self.seconds += time.perf_counter() - start


def make_model(width: int, layers: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(width, width // 64, 4 * width, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


def compare(width: int, layers: int, steps: int) -> None:
    model = make_model(width, layers)
    params = list(model.parameters())
    clipped = fusedopt.FusedAdamW(params, lr=0.0, max_grad_norm=1.0)
    unclipped = fusedopt.FusedAdamW(params, lr=0.0)
    watch = Stopwatch()
    for param in params:
        param.register_post_accumulate_grad_hook(lambda it: watch.measure(it.grad))
    in_hooks, extra = [], []
    for _ in range(steps):
        watch.seconds = 0.0
        model(torch.randn(BATCH, LENGTH, width)).square().mean().backward()
        in_hooks.append(watch.seconds)
        seconds = {}
        for opt in (clipped, unclipped):
            start = time.perf_counter()
            opt.step()
            seconds[opt] = time.perf_counter() - start
        extra.append(seconds[clipped] - seconds[unclipped])
        clipped.zero_grad()
    size = f"{sum(p.numel() for p in params) / 1e6:.1f}M in {len(params)} tensors"
    hooks, step = median(in_hooks[2:]) * 1e3, median(extra[2:]) * 1e3
    print(f"{size}: hooks {hooks:.2f} ms, norm in the step {step:.2f} ms")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    torch.manual_seed(0)
    for width, layers in ((128, 4), (512, 8), (1024, 4)):
        compare(width, layers, options.steps)
