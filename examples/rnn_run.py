"""The parts of exploding_rnn.py: a text, a network, and the ways to take a step."""

from __future__ import annotations

import math
import pydoc_data.topics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

import fusedopt

TORCH = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
FUSED = {"adam": fusedopt.FusedAdam, "sgd": fusedopt.FusedSGD}


@dataclass
class Settings:
    """The options of a run."""

    LRS: ClassVar[dict[str, float]] = {"adam": 3e-3, "sgd": 0.1}

    optimizer: str = "adam"
    lr: float | None = None  # None: the one in LRS
    max_grad_norm: float = 1.0
    steps: int = 200
    length: int = 128
    batch_size: int = 32
    hidden: int = 128
    seed: int = 0
    backend: Any = None

    def for_optimizer(self) -> dict[str, Any]:
        momentum = {"momentum": 0.9} if self.optimizer == "sgd" else {}
        return {"lr": self.LRS[self.optimizer] if self.lr is None else self.lr, **momentum}


class Text:
    """Python's documentation as numbers of letters; the last tenth is for testing."""

    def __init__(self) -> None:
        text = "".join(pydoc_data.topics.topics.values())
        letters = sorted(set(text))
        number = {letter: i for i, letter in enumerate(letters)}
        ids = torch.tensor([number[letter] for letter in text])
        self.letters = len(letters)
        self.training, self.test = ids.tensor_split([len(ids) * 9 // 10])


class Network(nn.Module):
    """A recurrent network of rectified linear units; its recurrent matrix starts as identity."""

    def __init__(self, letters: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(letters, 64)
        self.rnn = nn.RNN(64, hidden, nonlinearity="relu", batch_first=True)
        self.out = nn.Linear(hidden, letters)
        inputs, recurrent, *biases = self.rnn.parameters()
        nn.init.normal_(inputs, std=0.05)
        nn.init.eye_(recurrent)
        for bias in biases:
            nn.init.zeros_(bias)

    def loss(self, letters: Tensor) -> Tensor:
        """The surprise at a next letter, in nats; `letters`: int64, shape (texts, length + 1)."""
        states, _ = self.rnn(self.embedding(letters[:, :-1]))
        return nn.functional.cross_entropy(self.out(states).flatten(0, 1), letters[:, 1:].flatten())


class Reading(NamedTuple):
    """The result of one step: its norm and decision."""

    grad_norm: float
    clip_coef: float
    skipped: bool


# Makes the optimizer of a network, and the function to call after `backward()`.
Way = Callable[[Network, Settings], tuple[torch.optim.Optimizer, Callable[[], Reading]]]


def torch_unclipped() -> Way:
    def make(network: Network, settings: Settings) -> Any:
        optimizer = TORCH[settings.optimizer](network.parameters(), **settings.for_optimizer())

        def update() -> Reading:
            norm = nn.utils.get_total_norm(
                [p.grad for p in network.parameters() if p.grad is not None]
            )
            optimizer.step()
            return Reading(norm.item(), 1.0, False)

        return optimizer, update

    return make


def torch_clipped(max_norm: float) -> Way:
    def make(network: Network, settings: Settings) -> Any:
        optimizer = TORCH[settings.optimizer](network.parameters(), **settings.for_optimizer())

        def update() -> Reading:
            norm = nn.utils.clip_grad_norm_(network.parameters(), max_norm).item()
            optimizer.step()
            return Reading(norm, min(1.0, max_norm / (norm + 1e-6)), False)

        return optimizer, update

    return make


def fused(**clipping: Any) -> Way:
    """An optimizer of fusedopt with these arguments, in addition to the common ones."""

    def make(network: Network, settings: Settings) -> Any:
        options = settings.for_optimizer() | {"backend": settings.backend, "telemetry": 64}
        named = network.named_parameters()
        optimizer = FUSED[settings.optimizer](named, **options, nonfinite="skip", **clipping)

        def update() -> Reading:
            optimizer.step()
            step = optimizer.telemetry()
            coef, skipped = step.clip_coef[-1].item(), bool(step.skipped[-1])
            return Reading(step.grad_norm[-1].item(), coef, skipped)

        return optimizer, update

    return make


class Run:
    """One way to train, from the same weights and on the same letters as all others.

    Attributes:
        losses: the loss of every step, up to the step that made a weight inf or nan.
        readings: the reading of every step.
        test_loss: the loss at the end, on text that was not used for training.
    """

    COLUMNS = ("training loss", "test loss", "largest norm", "median norm", "clipped", "skipped")

    def __init__(self, text: Text, settings: Settings, way: Way, log: Path) -> None:
        torch.manual_seed(settings.seed)
        self.text, self.settings, self.log = text, settings, log
        self.network = Network(text.letters, settings.hidden)
        self.optimizer, self.update = way(self.network, settings)
        self.order = torch.Generator().manual_seed(settings.seed)
        self.losses: list[float] = []
        self.readings: list[Reading] = []
        self.test_loss = math.nan

    def train(self, bar: tqdm) -> None:
        """Takes all steps. Runs of fusedopt are also logged, for `python -m fusedopt plot`."""
        monitor = None
        if isinstance(self.optimizer, fusedopt.FusedOptimizer):
            self.log.unlink(missing_ok=True)
            monitor = fusedopt.Monitor(self.optimizer, self.log)
        for _ in range(self.settings.steps):
            bar.update()
            if not self.is_lost():
                self.step()
        if monitor is not None:
            monitor.close()
        with torch.no_grad():
            length = self.settings.length + 1
            test = self.text.test[: len(self.text.test) // length * length].view(-1, length)
            self.test_loss = self.network.loss(test[:100]).item()

    def is_lost(self) -> bool:
        """Whether a weight is inf or nan. Then every later loss is too."""
        return not all(weight.isfinite().all() for weight in self.network.parameters())

    def step(self) -> None:
        length, text = self.settings.length + 1, self.text.training
        starts = torch.randint(
            len(text) - length, (self.settings.batch_size, 1), generator=self.order
        )
        loss = self.network.loss(text[starts + torch.arange(length)])
        self.optimizer.zero_grad()
        loss.backward()
        self.losses.append(loss.item())
        self.readings.append(self.update())

    def summary(self) -> list[str]:
        """Cells for COLUMNS; the training loss is the mean of the last tenth of the steps."""
        steps, last = len(self.losses), self.losses[-max(1, self.settings.steps // 10) :]
        norms = sorted(
            r.grad_norm if r.grad_norm == r.grad_norm else math.inf for r in self.readings
        )
        clipped = sum(r.clip_coef < 1 and not r.skipped for r in self.readings)
        skipped = sum(r.skipped for r in self.readings)
        training = f"lost in step {steps}" if self.is_lost() else f"{sum(last) / len(last):.3f}"
        cells = (training, f"{self.test_loss:.3f}", f"{norms[-1]:.2g}", f"{norms[steps // 2]:.2g}")
        return [*cells, str(clipped), str(skipped)]
