"""Train a small convolutional network on images of handwritten digits with a fused optimizer.

Usage:
    python examples/train_digits.py                     # scikit-learn's digits, FusedAdam
    python examples/train_digits.py --data train.csv --optimizer fused-adamw --epochs 5

It needs `pip install numpy scikit-learn matplotlib tqdm`. Each epoch ends with a checkpoint in
--out, from which --resume continues as if the run had never stopped; the run ends with a picture of
its loss and gradient norm. With --explode, some steps get a huge loss or an infinite gradient. The
fused optimizer clips the huge loss's gradient and skips the infinite one. torch's optimizer, shown
next to it, is lost.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from needs import needs

with needs("numpy", "scikit-learn", "matplotlib", "tqdm"):
    from digits_data import DataError, Digits, load_digits, read_csv
    from digits_plot import plot
    from digits_run import FUSED, TORCH, Run, RunError, Settings, load_checkpoint
    from tqdm import tqdm

TABLE = {  # values per epoch: the title of the column, and the format of its cells
    "train_loss": ("train loss", "10.4f"),
    "train_accuracy": ("accuracy", "10.2%"),
    "test_loss": ("test loss", "10.4f"),
    "test_accuracy": ("accuracy", "10.2%"),
    "clipped": ("clipped", "10d"),
    "skipped": ("skipped", "10d"),
    "seconds": ("seconds", "10.2f"),
}
EXPLODE_AT = (0.3, 0.5, 0.7)  # parts of the whole run, unless --explode names steps


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    try:
        args, checkpoint = parse(parser, argv)
        args.out.mkdir(parents=True, exist_ok=True)
        if args.explode is None:
            train(args, checkpoint)
        else:
            explode(args)
    except (DataError, RunError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"\n{parser.prog}: interrupted\n")


def train(args: argparse.Namespace, checkpoint: dict[str, Any] | None) -> None:
    """One run, with a checkpoint after each epoch."""
    run = Run(read_data(args), settings_of(args), args.device)
    if checkpoint:
        run.restore(checkpoint)
        if len(run.epochs) >= args.epochs:
            raise RunError(f"{args.resume} has {len(run.epochs)} epochs; ask for more (--epochs)")
    fit(run, args, save_to=args.out / "checkpoint.pt")
    plot({args.optimizer: run}, args.out / "training.png")
    images = len(run.digits.test_labels)
    print(f"test accuracy {run.epochs[-1]['test_accuracy']:.2%} on {images} images")
    print(f"wrote checkpoint.pt and training.png to {args.out}")


def explode(args: argparse.Namespace) -> None:
    """The same run with the same explosions twice: as chosen, and with torch's own optimizer."""
    digits = read_data(args)
    chosen = settings_of(args)
    plain = replace(chosen, optimizer=args.optimizer.removeprefix("fused-"), max_grad_norm=math.inf)
    runs = {}
    for settings in (chosen, plain):
        protected = settings.optimizer in FUSED or settings.max_grad_norm < math.inf
        limit = f"max norm {settings.max_grad_norm:g}" if protected else "unprotected"
        name = f"{settings.optimizer}, {limit}"
        print(f"\n{name}")
        run = runs[name] = Run(digits, settings, args.device)
        run.explosions = plan_explosions(args.explode, args.epochs * run.steps_per_epoch)
        fit(run, args, save_to=None)
    print_comparison(runs)
    plot(runs, args.out / "explode.png")
    print(f"wrote explode.png to {args.out}")


def plan_explosions(steps: Sequence[int], total: int) -> dict[int, str]:
    """A huge loss at each of the steps, and an infinite gradient at the step after it."""
    steps = steps or [max(1, round(total * part)) for part in EXPLODE_AT]
    late = [step for step in steps if step >= total]
    if late:
        raise RunError(f"--explode: step {late[0]} is not before the last step, {total}")
    return {step + 1: "gradient" for step in steps} | {step: "loss" for step in steps}


def fit(run: Run, args: argparse.Namespace, save_to: Path | None) -> None:
    """Train up to the last epoch; print a row of the table for each."""
    total, done = (epochs * run.steps_per_epoch for epochs in (args.epochs, len(run.epochs)))
    print("epoch " + "".join(f"{title:>12}" for title, _ in TABLE.values()))
    hide = True if args.no_progress else None  # None: shown on a terminal only
    with tqdm(total=total, initial=done, disable=hide, leave=False) as bar:
        for epoch in range(len(run.epochs) + 1, args.epochs + 1):
            bar.set_description(f"epoch {epoch} of {args.epochs}")
            run.train_epoch(bar)
            cells = (f"  {run.epochs[-1][key]:{style}}" for key, (_, style) in TABLE.items())
            tqdm.write(f"{epoch:>5} " + "".join(cells))
            if save_to:
                run.save(save_to)


def print_comparison(runs: dict[str, Run]) -> None:
    weights = sum(weight.numel() for run in runs.values() for weight in run.network.parameters())
    rows = {
        "": runs.keys(),
        "test accuracy": [f"{run.epochs[-1]['test_accuracy']:.2%}" for run in runs.values()],
        f"non-finite of {weights // len(runs)} weights": [
            str(run.nonfinite_weights()) for run in runs.values()
        ],
        "skipped steps": [f"{sum(run.steps['skipped']):.0f}" for run in runs.values()],
        "clipped steps": [f"{sum(run.steps['clipped']):.0f}" for run in runs.values()],
    }
    print()
    for title, cells in rows.items():
        print(f"{title:<30}" + "".join(f"{cell:>28}" for cell in cells))


def read_data(args: argparse.Namespace) -> Digits:
    return load_digits() if args.data is None else read_csv(Path(args.data))


def settings_of(args: argparse.Namespace) -> Settings:
    return Settings(**{name: getattr(args, name) for name in asdict(Settings())})


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> tuple[argparse.Namespace, dict[str, Any] | None]:
    """The options, and the checkpoint to resume from. Its settings are those of the new run."""
    args = parser.parse_args(argv)
    checkpoint = None
    if args.resume:
        if args.explode is not None:
            parser.error("--explode starts a run of its own: it cannot go with --resume")
        checkpoint = load_checkpoint(args.resume)
        settings = checkpoint["settings"]
        parser.set_defaults(out=args.resume.parent, **settings)
        args = parser.parse_args(argv)
        for name, value in settings.items():
            if name != "data" and getattr(args, name) != value:  # Run knows its data itself
                option = "--" + name.replace("_", "-")
                parser.error(f"{option} is {value} in the checkpoint and cannot change")
    if "max_grad_norm" not in args:
        args.max_grad_norm = 1.0 if args.optimizer in FUSED else math.inf
    return args, checkpoint


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train_digits.py",
        description="Train a small convolutional network on images of handwritten digits.",
    )
    add = parser.add_argument
    optimizers = [*FUSED, *TORCH]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = "images of your own: a column named label, then the pixels (default: scikit-learn's)"
    norm = "clip the gradient norm to this (default: 1.0, but for torch's optimizers inf: never)"
    explode = "blow up the loss at these steps and a gradient after each (default: three steps)"
    default = "(default: %(default)s)"

    add("--data", metavar="CSV", help=data)
    add("--optimizer", choices=optimizers, default="fused-adam", help=default)
    add("--device", type=device_name, default=device, help=default)
    add("--lr", type=number(float, 0), default=2e-3, help=f"learning rate {default}")
    add("--epochs", type=number(int, 1), default=20, help=default)
    add("--batch-size", type=number(int, 1), default=32, help=default)
    add("--max-grad-norm", type=norm_limit, default=argparse.SUPPRESS, help=norm)
    add("--seed", type=number(int, 0), default=0, help=default)
    add("--out", type=Path, default=Path("runs/digits"), help=f"folder for results {default}")
    add("--resume", type=Path, metavar="CHECKPOINT", help="go on from here, in the same folder")
    add("--explode", type=number(int, 1), nargs="*", metavar="STEP", help=explode)
    add("--no-progress", action="store_true", help="no progress bar (a pipe never gets one)")
    return parser


def number(kind: Callable[[str], float], least: float) -> Callable[[str], float]:
    """A type for argparse: a number in a range that every option can work with."""

    def parse_number(text: str) -> float:
        value = kind(text)
        if not least <= value < 2**63:
            raise argparse.ArgumentTypeError(f"{text} is not from {least} to below 2**63")
        return value

    parse_number.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse_number


def norm_limit(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def device_name(text: str) -> torch.device:
    try:
        torch.zeros(1, device=text).item()
    except Exception as error:  # each kind of device is missing in its own way
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"cannot use {text!r}: {reason}") from error
    return torch.device(text)


if __name__ == "__main__":
    main()
