"""Whether training in fewer bytes ends where float32's does: two tasks, five paired seeds.

    python -m benchmarks.quality [--seeds 5] [--save]

* digits: a network of three layers on scikit-learn's images, 1,200 steps;
* characters: the next character of Python's own documentation from the 16 before it, 600 steps.

Models compute in bfloat16. For each seed all formats begin with the same weights and see the same
batches; "float32" has exact masters and float32 states, and so the weights of a float32 optimizer
to the bit. Losses are taken over all images, or over the same 65,536 places in the text, with the
trained weights in float32. A format passes if, on average over the seeds,

* its loss differs from float32's by less than 0.002 and by no more than 3 standard errors;
* the length of its updates differs by less than 1%;
* the median root of its second moments differs by less than 1%.

Lengths and roots are means over the run. --save writes benchmarks/results/quality_<date>.json.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import fusedopt
from benchmarks import results

FORMATS: dict[str, dict[str, Any]] = {
    "float32": {"master_weights": "exact", "state_dtype": torch.float32},
    "exact + bfloat16": {"master_weights": "exact", "state_dtype": torch.bfloat16},
    "24bit + bfloat16": {"master_weights": "24bit", "state_dtype": torch.bfloat16},
    "24bit + 8bit": {"master_weights": "24bit", "state_dtype": "8bit"},
    "stochastic + 8bit": {"rounding": "stochastic", "state_dtype": "8bit"},
    "naive bfloat16": {},
}
BASE = "float32"
LOSS, ERRORS, SHARE = 0.002, 3.0, 0.01  # what a format may differ by
EVERY = 10  # steps between two looks at updates and states
CONTEXT, SYMBOLS = 16, 128


@dataclass(frozen=True)
class Task:
    """A training: its data are inputs and targets, whose first axis is that of the examples."""

    name: str
    steps: int
    lr: float
    batch: int
    data: Callable[[], tuple[Tensor, Tensor]]
    model: Callable[[], nn.Module]
    judged: int  # examples


@dataclass
class Run:
    """Measurements of one training."""

    loss: float = math.nan
    lengths: list[float] = field(default_factory=list)  # of updates of the trained weights
    roots: list[float] = field(default_factory=list)  # medians of sqrt(exp_avg_sq)


@dataclass(frozen=True)
class Verdict:
    """A format beside float32, over the seeds; `loss` is a difference, the others are ratios."""

    task: str
    format: str
    loss: float
    error: float
    length: float
    root: float

    @property
    def passes(self) -> bool:
        near = abs(self.loss) < LOSS and abs(self.loss) <= ERRORS * self.error
        return near and max(abs(self.length - 1), abs(self.root - 1)) < SHARE


@cache
def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels)


@cache
def characters() -> tuple[Tensor, Tensor]:
    """Every place of the text with the characters before it; what isn't ASCII is left out."""
    text = "\n".join(topics[name] for name in sorted(topics)).encode("ascii", "ignore")
    codes = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return codes.unfold(0, CONTEXT, 1)[:-1], codes[CONTEXT:].long()


class Characters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS, 24)
        self.layers = nn.Sequential(
            *(nn.Linear(24 * CONTEXT, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU()),
            nn.Linear(256, SYMBOLS),
        )

    def forward(self, codes: Tensor) -> Tensor:
        return self.layers(self.embedding(codes.int()).flatten(1))


def perceptron() -> nn.Module:
    layers = [nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)]
    return nn.Sequential(*layers)


TASKS = (
    Task("digits", 1200, 2e-3, 128, digits, perceptron, 1797),
    Task("characters", 600, 2e-3, 256, characters, Characters, 2**16),
)


def train(task: Task, formats: dict[str, Any], seed: int, steps: int) -> Run:
    """Trains a model. The learning rate falls to 0, along half a cosine."""
    inputs, targets = task.data()
    torch.manual_seed(seed)
    model = task.model().bfloat16()
    optimizer = fusedopt.FusedAdamW(
        model.named_parameters(), lr=task.lr, weight_decay=0.01, max_grad_norm=1.0, **formats
    )
    order, run = torch.Generator().manual_seed(seed), Run()
    for step in range(steps):
        batch = torch.randint(len(targets), (task.batch,), generator=order)
        optimizer.param_groups[0]["lr"] = task.lr * (1 + math.cos(math.pi * step / steps)) / 2
        outputs = model(_as_inputs(inputs[batch]))
        optimizer.zero_grad()
        cross_entropy(outputs.float(), targets[batch]).backward()
        looks = step % EVERY == 0
        before = fusedopt.master_weights(optimizer) if looks else {}
        optimizer.step()
        if looks:
            run.lengths.append(_length(before, fusedopt.master_weights(optimizer)))
            run.roots.append(median_root(optimizer))
    run.loss = _loss(task, model, fusedopt.master_weights(optimizer), inputs, targets)
    return run


def _as_inputs(values: Tensor) -> Tensor:
    return values.bfloat16() if values.is_floating_point() else values


def _length(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    squares = sum(float((after[key] - before[key]).double().square().sum()) for key in before)
    return math.sqrt(squares)


def median_root(optimizer: fusedopt.FusedOptimizer) -> float:
    states = fusedopt.convert.to_torch(optimizer)["state"].values()
    return float(torch.cat([it["exp_avg_sq"].flatten() for it in states]).sqrt().median())


@torch.no_grad()
def _loss(
    task: Task, model: nn.Module, weights: dict[str, Tensor], inputs: Tensor, targets: Tensor
) -> float:
    places = torch.linspace(0, len(targets) - 1, task.judged).long()
    outputs = functional_call(model, weights, (inputs[places],))
    return cross_entropy(outputs, targets[places]).item()


def verdict(task: Task, name: str, runs: Sequence[Run], base: Sequence[Run]) -> Verdict:
    pairs = [*zip(runs, base, strict=True)]
    losses = [run.loss - exact.loss for run, exact in pairs]
    error = statistics.stdev(losses) / math.sqrt(len(losses)) if len(losses) > 1 else math.inf

    def ratio(of: Callable[[Run], list[float]]) -> float:
        return statistics.fmean(sum(of(run)) / sum(of(exact)) for run, exact in pairs)

    length, root = ratio(lambda run: run.lengths), ratio(lambda run: run.roots)
    return Verdict(task.name, name, statistics.fmean(losses), error, length, root)


def measure(task: Task, seeds: int, steps: int | None = None) -> tuple[list[Verdict], list[float]]:
    """What all formats end with, and float32's losses."""
    runs = {
        name: [train(task, formats, seed, steps or task.steps) for seed in range(seeds)]
        for name, formats in FORMATS.items()
    }
    others = [name for name in FORMATS if name != BASE]
    verdicts = [verdict(task, name, runs[name], runs[BASE]) for name in others]
    return verdicts, [run.loss for run in runs[BASE]]


def as_text(verdicts: Sequence[Verdict], losses: Sequence[float]) -> list[str]:
    lines = [f"{verdicts[0].task}: float32's loss is {statistics.fmean(losses):.4f}"]
    lines += [
        f"  {it.format:18} loss {it.loss:+.4f} +- {it.error:.4f}, length {it.length:.3f}, "
        f"median root {it.root:.3f}: {'passes' if it.passes else 'FAILS'}"
        for it in verdicts
    ]
    return lines


def save(measured: dict[str, tuple[list[Verdict], list[float]]], folder: Path) -> Path:
    report = results.new_report("cpu") | {
        "rows": [
            {"suite": "quality", **asdict(it), "passes": it.passes}
            for its, _ in measured.values()
            for it in its
        ],
        "float32": {name: losses for name, (_, losses) in measured.items()},
    }
    return results.save(report, ["quality"], folder)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="of each task, instead of its own number")
    parser.add_argument("--save", nargs="?", const=results.FOLDER, type=Path, metavar="FOLDER")
    arguments = parser.parse_args(argv)
    measured = {}
    for task in TASKS:
        measured[task.name] = measure(task, arguments.seeds, arguments.steps)
        print("\n".join(as_text(*measured[task.name])), flush=True)
    if arguments.save is not None:
        print(f"saved in {save(measured, arguments.save)}")


if __name__ == "__main__":
    main()
