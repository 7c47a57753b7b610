"""Lightning and Fabric: its example resumes; clipping and AMP work as with torch's optimizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import assert_same_bits, same_bits
from torch import nn
from trainers import (
    MARKS,
    ROUNDED,
    digit_batches,
    example,
    numbers_after,
    params_of,
)

import fusedopt

pytestmark = MARKS


@pytest.mark.parametrize("options", [[], ["--trainer-clips"]], ids=["own clipping", "trainer's"])
def test_lightning_example_learns_and_resumes_exactly(tmp_path, capsys, options):
    main = example("lightning_digits", "pytorch_lightning").main
    first, second, whole = (str(tmp_path / name) for name in ("first", "second", "whole"))
    main(["--epochs", "4", "--output", whole, *options])
    printed = capsys.readouterr().out
    main(["--epochs", "2", "--output", first, *options])
    main(["--epochs", "4", "--output", second, "--resume", first, *options])
    accuracies = numbers_after("accuracy", printed)
    assert len(accuracies) == 4 and accuracies[-1] > 92
    assert capsys.readouterr().out == printed  # norms and accuracies, to the digit
    checkpoints = [torch.load(path, weights_only=False) for path in (whole, second)]
    weights = [checkpoint["state_dict"] for checkpoint in checkpoints]
    assert_same_bits(*weights)
    states = [checkpoint["optimizer_states"][0]["state"] for checkpoint in checkpoints]
    assert states[0].keys() == states[1].keys() and len(states[0]) == 4
    for index, state in states[0].items():
        assert_same_bits(state, states[1][index])
    assert states[0][0]["step"] == 4 * 45
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second", "whole"]


def lightning_fit(optimizer: Any, batches: Any, **options: Any) -> tuple[Any, Any]:
    """Fits a linear model in Lightning; returns the trainer and the optimizer."""
    import pytorch_lightning as pl

    class Model(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
            self.seen: list[tuple[float, float]] = []

        def training_step(self, batch: Any, _: Any) -> Any:
            return nn.functional.cross_entropy(self.net(batch[0].flatten(1)), batch[1])

        def on_train_batch_start(self, *_: Any) -> None:
            wrapped: Any = self.optimizers()  # of a class derived from the optimizer's
            if hasattr(wrapped, "grad_norm"):
                assert same_bits(wrapped.grad_norm, wrapped.optimizer.grad_norm)

        def configure_optimizers(self) -> Any:
            return optimizer(self.parameters())

    quiet: Any = dict.fromkeys(
        ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False
    )
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, **quiet, **options)
    trainer.fit(Model(), batches)
    return trainer, trainer.optimizers[0]


def lightning_precision(name: str) -> dict[str, Any]:
    """Lightning has no 16-mixed of its own on a CPU: there it takes the plugin behind it."""
    from pytorch_lightning.plugins import MixedPrecision

    if name != "16-mixed":
        return {"precision": name}
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("fused", [None, True])
def test_lightning_clips_as_with_torchs_optimizer(precision, fused):
    example("lightning_digits", "pytorch_lightning")
    options: Any = {"gradient_clip_val": 0.1, "accumulate_grad_batches": 2}
    results = [
        lightning_fit(make, digit_batches(), **options, **lightning_precision(precision))[1]
        for make in (
            lambda params: fusedopt.FusedAdamW(params, lr=1e-2, fused=fused),
            lambda params: torch.optim.AdamW(params, lr=1e-2),
        )
    ]
    assert results[0].grad_norm <= 0.1001 and results[0].state_dict()["state"][0]["step"] == 6
    tolerance = 1e-5 if precision == "32-true" else ROUNDED
    torch.testing.assert_close(*map(params_of, results), rtol=1e-4, atol=tolerance)


def test_lightning_still_refuses_to_clip_for_torchs_fused_optimizer():
    """What docs/migrating.md says, and why `_step_supports_amp_scaling` is False in ours."""
    example("lightning_digits", "pytorch_lightning")
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        lightning_fit(
            lambda params: torch.optim.AdamW(params, fused=True),
            digit_batches(),
            gradient_clip_val=0.1,
            precision="bf16-mixed",
        )


@pytest.mark.parametrize("clips", [None, 1.0], ids=["own clipping", "trainer's"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_lightning_goes_on_after_a_nan(precision, clips):
    example("lightning_digits", "pytorch_lightning")

    def make(params):
        limit = 1.0 if clips is None else None
        return fusedopt.FusedAdamW(params, lr=1e-2, max_grad_norm=limit, nonfinite="skip")

    options: Any = {"gradient_clip_val": clips, **lightning_precision(precision)}
    _, optimizer = lightning_fit(make, digit_batches(poisoned=5), **options)
    # A scaler skips the step without calling it; the optimizer then sees and counts nothing.
    assert optimizer.skipped_steps == (0 if precision == "16-mixed" else 1)
    assert all(p.isfinite().all() for p in params_of(optimizer))
    assert optimizer.state_dict()["state"][0]["step"] == 11


def test_fabric_clips_and_shows_the_readings():
    """Its wrapper derives from the optimizer's class: settings and readings must pass through."""
    example("lightning_digits", "pytorch_lightning")
    from lightning_fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1)
    torch.manual_seed(0)
    net = nn.Linear(3, 1)
    inner = fusedopt.FusedAdamW(net.parameters(), fused=True)
    model, optimizer = fabric.setup(net, inner)
    assert optimizer.grad_norm == 0
    optimizer.max_grad_norm = 0.5
    for _ in range(2):
        fabric.backward(model(torch.ones(2, 3)).sum())
        fabric.clip_gradients(model, optimizer, max_norm=0.25)
        optimizer.step()
        optimizer.zero_grad()
    assert inner.max_grad_norm == 0.5
    torch.testing.assert_close(optimizer.grad_norm, torch.tensor(0.25))
