"""Accelerate: its example resumes; clipping and scaling work as with torch's optimizer."""

from __future__ import annotations

import pytest
import torch
from cases import assert_same_bits, same_bits, snapshot, tensors_of
from torch import nn
from trainers import (
    MARKS,
    digit_batches,
    example,
    numbers_after,
    params_of,
)

import fusedopt

pytestmark = MARKS


@pytest.fixture
def accelerator_of(monkeypatch):
    """Makes an Accelerator. Its states are singletons: they go when the test is over."""
    pytest.importorskip("accelerate")
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield lambda **options: Accelerator(cpu=True, **options)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("options", [[], ["--trainer-clips"]], ids=["own clipping", "trainer's"])
def test_accelerate_example_learns_and_resumes_exactly(tmp_path, capsys, accelerator_of, options):
    main = example("accelerate_gru", "accelerate").main
    first, second, whole = (str(tmp_path / name) for name in ("first", "second", "whole"))
    main(["--epochs", "4", "--output", whole, *options])
    printed = capsys.readouterr().out
    main(["--epochs", "2", "--output", first, *options])
    main(["--epochs", "4", "--output", second, "--resume", first, *options])
    accuracies = numbers_after("accuracy", printed)
    assert len(accuracies) == 4 and accuracies[-1] > max(80, accuracies[0])
    assert capsys.readouterr().out == printed
    for name in ("optimizer.bin", "model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def accelerate_run(accelerator, make, poisoned=None, clip=None, scaler=None):
    """Trains on digits; returns the optimizer, its wrapper and the wrapped scheduler."""
    example("accelerate_gru", "accelerate")
    accelerator.scaler = scaler  # Accelerate makes one on accelerators only
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
    inner = make(net.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(inner, 100, 0.1)
    model, optimizer, batches, schedule = accelerator.prepare(
        net, inner, digit_batches(poisoned), schedule
    )
    for images, labels in batches:
        with accelerator.accumulate(model):
            accelerator.backward(nn.functional.cross_entropy(model(images), labels))
            if accelerator.sync_gradients and clip is not None:
                if scaler is not None:
                    scaler.unscale_(inner)
                accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return inner, optimizer, schedule


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_accelerate_clips_as_with_torchs_optimizer(accelerator_of, scaled, fused):
    results = []
    for make in (
        lambda params: fusedopt.FusedAdamW(params, lr=1e-2, fused=fused),
        lambda params: torch.optim.AdamW(params, lr=1e-2),
    ):
        accelerator = accelerator_of(gradient_accumulation_steps=2)
        scaler = torch.amp.GradScaler("cpu") if scaled else None
        inner, _, _ = accelerate_run(accelerator, make, clip=0.1, scaler=scaler)
        results.append(inner)
    assert results[0].state_dict()["state"][0]["step"] == 6
    torch.testing.assert_close(results[0].grad_norm, torch.tensor(0.1), rtol=1e-3, atol=0)
    torch.testing.assert_close(*map(params_of, results), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("clip", [None, 1.0], ids=["own clipping", "accelerate's"])
@pytest.mark.parametrize("scaled", [False, True])
def test_accelerate_goes_on_after_a_nan(accelerator_of, scaled, clip):
    def make(params):
        limit = 1.0 if clip is None else None
        return fusedopt.FusedAdamW(params, lr=1e-2, max_grad_norm=limit, nonfinite="skip")

    scaler = torch.amp.GradScaler("cpu") if scaled else None
    inner, _, schedule = accelerate_run(accelerator_of(), make, 5, clip, scaler)
    assert all(p.isfinite().all() for p in params_of(inner))
    assert inner.state_dict()["state"][0]["step"] == 11
    # A scaler doesn't call the step, and the schedule then waits; a skip within the step it can't
    # see without waiting for the device.
    assert inner.skipped_steps == (0 if scaled else 1)
    assert schedule.scheduler.last_epoch == (11 if scaled else 12)


def test_accelerate_saves_and_loads_a_state(accelerator_of, tmp_path):
    accelerator = accelerator_of()

    def make(params):
        return fusedopt.FusedAdamW(params, lr=1e-2, max_grad_norm=1.0)

    inner, _, _ = accelerate_run(accelerator, make)
    accelerator.save_state(str(tmp_path))
    saved = snapshot(inner)
    params = inner.param_groups[0]["params"]
    for param in params:
        param.grad = torch.ones_like(param)
    inner.step()
    assert not same_bits(params[0], saved["param 0"])
    after = snapshot(inner)
    accelerator.load_state(str(tmp_path))
    assert_same_bits(tensors_of(inner), saved)
    inner.step()
    assert_same_bits(tensors_of(inner), after)
