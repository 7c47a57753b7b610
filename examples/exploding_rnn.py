"""Gradients that explode by themselves: a recurrent network on English text, clipped and not.

Usage:
    python examples/exploding_rnn.py                        # Adam
    python examples/exploding_rnn.py --optimizer sgd        # SGD with momentum
    python -m fusedopt plot runs/rnn/fusedopt-fixed.jsonl   # one of its runs, layer by layer

It needs `pip install numpy scikit-learn matplotlib tqdm`. The text is Python's own documentation,
read letter by letter. The network is a plain RNN of rectified linear units that starts from the
identity (Le, Jaitly and Hinton, 2015, "A simple way to initialize recurrent networks of rectified
linear units"; they clip). Its gradient goes back through a product of as many matrices as there are
letters (Pascanu, Mikolov and Bengio, 2013, "On the difficulty of training recurrent neural
networks"), 128 by default. Its norm is mostly around 1, but in the second step it is 400,000.

Without clipping, SGD takes a huge step, and its weights become nan. Adam divides by the root of its
average of squares, so that its step stays small. But with betas=(0.9, 0.999) the average remembers
the first steps for thousands of steps, in which the network learns almost nothing.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from needs import needs

with needs("numpy", "scikit-learn", "matplotlib", "tqdm"):
    from rnn_plot import plot
    from rnn_run import Run, Settings, Text, Way, fused, torch_clipped, torch_unclipped
    from tqdm import tqdm

from fusedopt.clip import Percentile, PerTensor, Unit, ZScore

# Every way to train has a line here: its name, and the function that makes its optimizer.
WAYS: dict[str, Callable[[Settings], Way]] = {
    "torch, no clipping": lambda it: torch_unclipped(),
    "torch, clip_grad_norm_": lambda it: torch_clipped(it.max_grad_norm),
    "fusedopt, fixed": lambda it: fused(max_grad_norm=it.max_grad_norm),
    "fusedopt, Percentile": lambda it: fused(max_grad_norm=Percentile(max_norm=it.max_grad_norm)),
    "fusedopt, ZScore": lambda it: fused(max_grad_norm=ZScore(max_norm=it.max_grad_norm)),
    "fusedopt, PerTensor": lambda it: fused(max_grad_norm=PerTensor(warmup_norm=it.max_grad_norm)),
    "fusedopt, Unit": lambda it: fused(max_grad_norm=Unit()),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    options = vars(args).copy()
    out, quiet = options.pop("out"), options.pop("no_progress")
    settings = Settings(**options)
    text = Text()
    try:
        out.mkdir(parents=True, exist_ok=True)
        print(f"{'':24}" + "".join(f"{title:>14}" for title in Run.COLUMNS))
        runs = {}
        with tqdm(total=len(WAYS) * settings.steps, disable=quiet or None, leave=False) as bar:
            for name, make_way in WAYS.items():
                bar.set_description(name)
                log = out / f"{name.replace(', ', '-').replace(' ', '-')}.jsonl"
                run = runs[name] = Run(text, settings, make_way(settings), log)
                run.train(bar)
                tqdm.write(f"{name:24}" + "".join(f"{cell:>14}" for cell in run.summary()))
        plot(runs, out / "exploding_rnn.png")
    except (OSError, ValueError, RuntimeError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"\n{parser.prog}: interrupted\n")
    print(f"wrote exploding_rnn.png and the logs of fusedopt's runs to {out}")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="exploding_rnn.py",
        description="Train a recurrent network whose gradients explode, clipped and not.",
    )
    add, default = parser.add_argument, "(default: %(default)s)"
    lrs = ", ".join(f"{lr:g} with {name}" for name, lr in Settings.LRS.items())
    backend = "where fusedopt's steps run (default: by the parameters' device)"

    add("--optimizer", choices=list(Settings.LRS), default="adam", help=default)
    add("--lr", type=number(float, above=0), help=f"learning rate (default: {lrs})")
    add("--max-grad-norm", type=number(float, above=0), default=1.0, help=f"fixed limit {default}")
    add("--steps", type=number(int, above=0), default=200, help=default)
    add("--length", type=number(int, above=0), default=128, help=f"letters to go back {default}")
    add("--batch-size", type=number(int, above=0), default=32, help=default)
    add("--hidden", type=number(int, above=0), default=128, help=f"size of the state {default}")
    add("--seed", type=number(int, above=-1), default=0, help=default)
    add("--backend", choices=("cpu", "cuda", "reference"), help=backend)
    add("--out", type=Path, default=Path("runs/rnn"), help=f"folder for results {default}")
    add("--no-progress", action="store_true", help="no progress bar (a pipe never gets one)")
    return parser


def number(kind: Callable[[str], Any], above: float) -> Callable[[str], Any]:
    """A type for argparse: a number in a range that every option can work with."""

    def parse_number(text: str) -> Any:
        value = kind(text)
        if not above < value < math.inf or value >= 2**63:
            raise argparse.ArgumentTypeError(f"{text} is not above {above} and below 2**63")
        return value

    parse_number.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse_number


if __name__ == "__main__":
    torch.set_num_threads(min(4, torch.get_num_threads()))  # the matrices are small
    main()
