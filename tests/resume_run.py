"""Trains one small network for every case, saves after every step, and continues from there.

python resume_run.py CHECKPOINT STEPS [KILL]: with KILL, a number of events (an optimizer's step, or
a checkpoint on its way to the disk) after which the process kills itself.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from cases import CASES


class Run:
    """A network, its optimizer, and with an odd index a scaler; all depends on `index` alone."""

    def __init__(self, index: int) -> None:
        case = CASES[index]
        torch.manual_seed(index)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)
        )
        if index % 3 == 0:
            self.model.bfloat16()
        max_grad_norm = (None, 0.5)[index % 2]
        self.optimizer = case.cls(
            self.model.parameters(), max_grad_norm=max_grad_norm, **case.kwargs
        )
        self.scaler = torch.amp.GradScaler(
            "cpu", init_scale=2.0**10, growth_interval=3, enabled=index % 2 == 1
        )

    def step(self, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        dtype = self.model[0].weight.dtype
        data = torch.randn(5, 6, generator=generator).to(dtype)
        loss = self.model(data).square().mean()
        if number % 4 == 2:
            loss = loss * float("inf")
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        if number % 4 != 2 or self.scaler.is_enabled() or self.optimizer.max_grad_norm:
            self.scaler.step(self.optimizer)
        self.scaler.update()

    def state_dict(self) -> dict[str, Any]:
        parts = (self.model, self.optimizer, self.scaler)
        return {str(i): part.state_dict() for i, part in enumerate(parts)}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        for i, part in enumerate((self.model, self.optimizer, self.scaler)):
            part.load_state_dict(saved[str(i)])


def train(path: Path, steps: int, event: Callable[[], None]) -> Iterator[dict[str, Any]]:
    """Yields what there is after every step."""
    runs = [Run(index) for index in range(len(CASES))]
    first = 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        first = saved["step"]
        for run, part in zip(runs, saved["runs"], strict=True):
            run.load_state_dict(part)
    for number in range(first, steps):
        for run in runs:
            run.step(number)
            event()
        written = path.with_suffix(".part")
        everything = {"step": number + 1, "runs": [run.state_dict() for run in runs]}
        torch.save(everything, written)
        event()
        written.replace(path)
        yield everything


def main() -> None:
    path, steps = Path(sys.argv[1]), int(sys.argv[2])
    left = int(sys.argv[3]) if len(sys.argv) > 3 else -1

    def event() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    for _ in train(path, steps, event):
        pass


if __name__ == "__main__":
    main()
