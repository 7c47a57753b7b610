"""Whole training steps: forward, backward, clipping and update, with our optimizer or torch's."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

import fusedopt
from benchmarks.comparisons import Outcome
from benchmarks.peers import OURS
from benchmarks.timing import Effort, Step, interleaved

TORCHS = "torch and clip_grad_norm_"

Loss = Callable[[nn.Module], Tensor]


class Transformer(nn.Module):
    """A language model like GPT-2, of any size: pre-norm blocks, and tied embeddings."""

    def __init__(self, vocabulary: int, context: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, tokens.device)
        x = self.tokens(tokens) + self.positions.weight[:length]
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        return F.linear(self.norm(x), self.tokens.weight)


@dataclass(frozen=True)
class TrainingComparison:
    """Training with either optimizer, from the same weights, on the same data.

    Attributes:
        unit, units: the name and the number of the items in a batch, such as tokens.
        setup: makes a model on a device, and its loss on one batch.
    """

    title: str
    unit: str
    units: int
    setup: Callable[[str], tuple[nn.Module, Loss]]
    optimizer: str = "AdamW"
    any_threads: bool = True

    def facts(self) -> dict[str, Any]:
        return {"case": self.title, "optimizer": self.optimizer, "unit": self.unit,
                "units": self.units}  # fmt: skip

    def run(self, sides: list[str], device: str, effort: Effort) -> Outcome:
        steps = {side: self.make_step(side, device) for side in sides}
        return Outcome(interleaved(steps, device, effort), {})

    def make_step(self, side: str, device: str) -> Step:
        torch.manual_seed(0)
        model, loss_of = self.setup(device)
        params = list(model.parameters())
        if side == OURS:
            optimizer = getattr(fusedopt, f"Fused{self.optimizer}")(params, max_grad_norm=1.0)
        else:
            cls = getattr(torch.optim, self.optimizer)
            fused = {"fused": True} if "fused" in inspect.signature(cls).parameters else {}
            optimizer = cls(params, **fused)

        def step() -> None:
            optimizer.zero_grad()
            loss_of(model).backward()
            if side != OURS:
                clip_grad_norm_(params, 1.0)
            optimizer.step()

        return step


def transformer_setup(batch: int, length: int, vocabulary: int, width: int, layers: int) -> Any:
    """A setup on random tokens: their values don't change the cost of a step."""

    def setup(device: str) -> tuple[nn.Module, Loss]:
        model = Transformer(vocabulary, length, width, layers, heads=width // 64).to(device)
        tokens = torch.randint(vocabulary, (batch, length + 1), device=device)
        inputs, targets = tokens[:, :-1], tokens[:, 1:].flatten()
        return model, lambda model: F.cross_entropy(model(inputs).flatten(0, 1), targets)

    return setup


def digits_setup(batch: int) -> Any:
    """The network of examples/train_digits.py on a batch of scikit-learn's digits."""

    def setup(device: str) -> tuple[nn.Module, Loss]:
        examples = str(Path(__file__).parent.parent / "examples")
        if examples not in sys.path:
            sys.path.append(examples)
        from digits_data import load_digits
        from digits_run import make_network

        digits = load_digits().to(torch.device(device))
        images, labels = digits.train_images[:batch], digits.train_labels[:batch]
        model = make_network(digits.side, len(digits.classes)).to(device)
        return model, lambda model: F.cross_entropy(model(images), labels)

    return setup


def training_comparisons() -> list[TrainingComparison]:
    def transformer(batch: int, length: int) -> TrainingComparison:
        return TrainingComparison(
            f"transformer of 7.5M, batches of {batch} x {length}",
            "tokens",
            batch * length,
            transformer_setup(batch, length, vocabulary=8192, width=256, layers=7),
        )

    return [
        transformer(1, 64),
        transformer(4, 256),
        *(
            TrainingComparison(f"digits, batches of {n}", "images", n, digits_setup(n))
            for n in (32, 256)
        ),
    ]
