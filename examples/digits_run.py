"""A training run that can stop and continue: its network, optimizer and checkpoints.

Usage:
    run = Run(load_digits(), Settings(optimizer="fused-adam"), torch.device("cpu"))
    run.train_epoch(tqdm())
    run.save(Path("checkpoint.pt"))
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from digits_data import Digits
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, get_total_norm
from tqdm import tqdm

from fusedopt import FusedAdam, FusedAdamW, FusedRMSprop

FUSED = {"fused-adam": FusedAdam, "fused-adamw": FusedAdamW, "fused-rmsprop": FusedRMSprop}
TORCH = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "rmsprop": torch.optim.RMSprop}

FORMAT = "train_digits checkpoint 1"
HUGE = 1e30  # the factor of a loss that explodes


class RunError(Exception):
    """The reason why a run can't start with these options."""


@dataclass(frozen=True)
class Settings:
    """The options that decide the result of a run. They can't change when it is resumed."""

    data: str | None = None
    optimizer: str = "fused-adam"
    lr: float = 2e-3
    batch_size: int = 32
    max_grad_norm: float = 1.0  # inf: the norm is measured, and nothing is clipped
    seed: int = 0


def make_network(side: int, classes: int) -> nn.Sequential:
    pooled = math.ceil(side / 4)  # the side of an image after pooling twice
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.Flatten(),
        nn.Linear(64 * pooled**2, 128),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(128, classes),
    )


def make_optimizer(network: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    if settings.optimizer in FUSED:
        return FUSED[settings.optimizer](
            network.parameters(), lr=settings.lr, max_grad_norm=settings.max_grad_norm
        )
    return TORCH[settings.optimizer](network.parameters(), lr=settings.lr)


class Run:
    """One training run."""

    def __init__(self, digits: Digits, settings: Settings, device: torch.device) -> None:
        torch.manual_seed(settings.seed)
        self.digits = digits.to(device)
        self.settings = settings
        self.device = device
        self.network = make_network(digits.side, len(digits.classes)).to(device)
        self.optimizer = make_optimizer(self.network, settings)
        self.order = torch.Generator().manual_seed(settings.seed)  # shuffles the training images
        self.explosions: dict[int, str] = {}  # by step: "loss" (huge) or "gradient" (infinite)
        self.steps: dict[str, list[float]] = {}  # values per step: loss, grad_norm, skipped, ...
        self.epochs: list[dict[str, float]] = []  # values per epoch: train_loss, test_loss, ...

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.digits.train_labels) / self.settings.batch_size)

    def train_epoch(self, bar: tqdm) -> None:
        """Train on every image once, then test; note both in `steps` and `epochs`."""
        started = time.perf_counter()
        log = self.take_steps(bar)
        norm = log["grad_norm"]
        log["clipped"] = ((norm > self.settings.max_grad_norm) & (log["skipped"] == 0)).float()
        for name, values in log.items():
            self.steps.setdefault(name, []).extend(values.tolist())
        test_loss, test_accuracy = self.evaluate()
        self.epochs.append(
            {
                "step": len(self.steps["loss"]),
                "train_loss": log["loss"].mean().item(),
                "train_accuracy": log["correct"].sum().item() / len(self.digits.train_labels),
                "test_loss": test_loss,
                "test_accuracy": test_accuracy,
                "clipped": int(log["clipped"].sum()),
                "skipped": int(log["skipped"].sum()),
                "seconds": time.perf_counter() - started,
            }
        )

    def take_steps(self, bar: tqdm) -> dict[str, Tensor]:
        """Takes one epoch of steps. Their measurements stay on the device until the epoch ends:
        to read a tensor at each step would make the processor wait for the device each time.
        """
        log: dict[str, list[Tensor]] = {"loss": [], "correct": [], "grad_norm": [], "skipped": []}
        images, labels = self.digits.train_images, self.digits.train_labels
        order = torch.randperm(len(labels), generator=self.order).to(self.device)
        first = len(self.steps.get("loss", ())) + 1
        self.network.train()
        for step, batch in enumerate(order.split(self.settings.batch_size), first):
            logits = self.network(images[batch])
            loss = F.cross_entropy(logits, labels[batch])
            self.optimizer.zero_grad()
            self.backward(loss, self.explosions.get(step))
            grad_norm, skipped = self.update()

            log["loss"].append(loss.detach())
            log["correct"].append((logits.argmax(1) == labels[batch]).sum())
            log["grad_norm"].append(grad_norm)
            log["skipped"].append(skipped)
            bar.update()
        return {name: torch.stack(values).float().cpu() for name, values in log.items()}

    def backward(self, loss: Tensor, explosion: str | None) -> None:
        if explosion == "loss":
            loss = loss * HUGE
        loss.backward()
        if explosion == "gradient":
            gradient = next(self.network.parameters()).grad
            assert gradient is not None
            gradient.view(-1)[0] = math.inf

    def update(self) -> tuple[Tensor, Tensor]:
        """Step the optimizer. Returns the gradient norm and whether the step was skipped."""
        optimizer, limit = self.optimizer, self.settings.max_grad_norm
        if isinstance(optimizer, FusedAdam | FusedAdamW | FusedRMSprop):
            optimizer.step()
            return optimizer.grad_norm, optimizer.step_skipped
        # torch's optimizers leave the gradients to the caller, and never skip a step.
        parameters = list(self.network.parameters())
        if limit == math.inf:
            norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        else:
            norm = clip_grad_norm_(parameters, limit)
        optimizer.step()
        return norm, torch.zeros_like(norm, dtype=torch.bool)

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float]:
        """Loss and accuracy on the test images."""
        self.network.eval()
        images, labels = self.digits.test_images, self.digits.test_labels
        logits = torch.cat([self.network(batch) for batch in images.split(1000)])
        loss = F.cross_entropy(logits, labels)
        return loss.item(), (logits.argmax(1) == labels).float().mean().item()

    def nonfinite_weights(self) -> int:
        return sum(int((~weight.isfinite()).sum()) for weight in self.network.parameters())

    def save(self, path: Path) -> None:
        """Write a checkpoint: whole or not at all, whenever the program is stopped."""
        checkpoint = {
            "format": FORMAT,
            "settings": asdict(self.settings),
            "fingerprint": self.digits.fingerprint,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "order": self.order.get_state(),
            "rng": torch.get_rng_state(),
            "steps": self.steps,
            "epochs": self.epochs,
        }
        if self.device.type == "cuda":
            checkpoint["cuda_rng"] = torch.cuda.get_rng_state(self.device)
        temporary = path.with_name(path.name + ".tmp")
        torch.save(checkpoint, temporary)
        os.replace(temporary, path)

    def restore(self, checkpoint: Mapping[str, Any]) -> None:
        if checkpoint["fingerprint"] != self.digits.fingerprint:
            raise RunError("the checkpoint was trained on other data")
        self.network.load_state_dict(checkpoint["network"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.steps, self.epochs = checkpoint["steps"], checkpoint["epochs"]
        self.order.set_state(checkpoint["order"])
        torch.set_rng_state(checkpoint["rng"])
        if self.device.type == "cuda" and "cuda_rng" in checkpoint:
            torch.cuda.set_rng_state(checkpoint["cuda_rng"], self.device)


def load_checkpoint(path: Path) -> dict[str, Any]:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise RunError(f"{path}: {error.strerror or error}") from error
    except Exception as error:  # a file that torch.load cannot read fails in many ways
        raise RunError(f"{path}: not a checkpoint of train_digits.py") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise RunError(f"{path}: not a checkpoint of train_digits.py")
    return checkpoint
