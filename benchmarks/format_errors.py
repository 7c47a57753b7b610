"""How far Adam's updates are off with states of fewer bits, against float32 averages.

    python benchmarks/format_errors.py

Each format's averages see the same gradients: normal numbers times a scale per element. In uneven
tensors the scales are log-normal, or one element in 64 has a scale 1,000 times as large. Printed
are, after the last step: the error of all updates relative to float32's, their length relative to
float32's, and the largest single update (float32's own is at most about 3).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fusedopt.reference import blocks
from fusedopt.reference.formats import STATE_SHIFT, RandomBits, rounded_at_random

BETA1, BETA2, EPS = 0.9, 0.999, 1e-12
SIGMAS = {"log-normal, sigma 1": 1.0, "log-normal, sigma 2": 2.0}

# From (name of the state, its new values, random bits) to the values that the next step reads.
Store = Callable[[str, Tensor, Tensor], Tensor]


def in_float32(name: str, values: Tensor, random: Tensor) -> Tensor:
    return values


def in_bfloat16(name: str, values: Tensor, random: Tensor) -> Tensor:
    return values.bfloat16().float()


def in_bfloat16_at_random(name: str, values: Tensor, random: Tensor) -> Tensor:
    if name == "exp_avg":
        return values.bfloat16().float()
    return rounded_at_random(values, torch.bfloat16, random).float()


def in_blocks_of(size: int, at_random: bool = True) -> Store:
    def store(name: str, values: Tensor, random: Tensor) -> Tensor:
        before, blocks.BLOCK_SIZE = blocks.BLOCK_SIZE, size
        try:
            coding = "linear" if name == "exp_avg" else "root"
            bits = random & blocks.RANDOM_MASK if at_random else blocks.NEAREST
            return blocks.decode(coding, *blocks.encode(coding, values, bits))
        finally:
            blocks.BLOCK_SIZE = before

    return store


FORMATS: dict[str, Store] = {
    "float32": in_float32,
    "bfloat16, nearest": in_bfloat16,
    "bfloat16": in_bfloat16_at_random,
    "8bit, nearest": in_blocks_of(64, at_random=False),
    "8bit, blocks of 32": in_blocks_of(32),
    "8bit, blocks of 64": in_blocks_of(64),
    "8bit, blocks of 128": in_blocks_of(128),
}


class Averages(NamedTuple):
    exp_avg: Tensor
    exp_avg_sq: Tensor

    def after(self, grad: Tensor, random: Tensor, store: Store) -> tuple[Averages, Tensor]:
        """The stored averages after a step, and the moments that the step itself divided."""
        exp_avg = BETA1 * self.exp_avg + (1 - BETA1) * grad
        exp_avg_sq = BETA2 * self.exp_avg_sq + (1 - BETA2) * grad * grad
        update = exp_avg / (exp_avg_sq.sqrt() + EPS)
        stored = Averages(
            store("exp_avg", exp_avg, random), store("exp_avg_sq", exp_avg_sq, random)
        )
        return stored, update


def scales(kind: str, count: int, generator: torch.Generator) -> Tensor:
    if kind == "even":
        return torch.ones(count)
    if kind in SIGMAS:
        return torch.exp(SIGMAS[kind] * torch.randn(count, generator=generator))
    result = torch.ones(count)
    result[::64] = 1000
    return result


def errors(kind: str, count: int, steps: int) -> dict[str, tuple[float, float, float]]:
    """By format: the relative error, the relative length, and the largest update."""
    generator = torch.Generator().manual_seed(0)
    scale = scales(kind, count, generator)
    averages = {name: Averages(torch.zeros(count), torch.zeros(count)) for name in FORMATS}
    updates: dict[str, Tensor] = {}
    largest = dict.fromkeys(FORMATS, 0.0)
    for step in range(1, steps + 1):
        grad = scale * torch.randn(count, generator=generator)
        random = RandomBits(0, step, 0).of(grad, STATE_SHIFT)
        correction = (1 - BETA2**step) ** 0.5 / (1 - BETA1**step)
        for name, store in FORMATS.items():
            averages[name], update = averages[name].after(grad, random, store)
            updates[name] = update * correction
            largest[name] = max(largest[name], float(updates[name].abs().max()))
    exact = updates["float32"]
    return {
        name: (
            float((it - exact).norm() / exact.norm()),
            float(it.norm() / exact.norm()),
            largest[name],
        )
        for name, it in updates.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=2**15, help="elements")
    parser.add_argument("--steps", type=int, default=1000)
    arguments = parser.parse_args()
    for kind in ("even", *SIGMAS, "one in 64"):
        print(f"{kind}, {arguments.count:,} elements, {arguments.steps:,} steps")
        for name, (error, length, largest) in errors(
            kind, arguments.count, arguments.steps
        ).items():
            print(f"  {name:20} error {error:6.1%}, length {length:.3f}, largest {largest:.1f}")


if __name__ == "__main__":
    main()
