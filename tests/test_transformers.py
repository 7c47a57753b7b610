"""Hugging Face's Trainer: its example resumes; clipping and bf16 work as with torch's optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import assert_same_bits, tensors_of
from trainers import (
    MARKS,
    ROUNDED,
    example,
    numbers_after,
    params_of,
)

import fusedopt

pytestmark = MARKS


@pytest.mark.parametrize("options", [[], ["--trainer-clips"]], ids=["own clipping", "trainer's"])
def test_transformers_example_learns_and_resumes(tmp_path, capsys, options):
    main = example("transformers_gpt2", "transformers").main
    main(["--steps", "40", "--output", str(tmp_path), *options])
    before = numbers_after("'loss':", capsys.readouterr().out)
    checkpoint = tmp_path / "checkpoint-40"
    main(["--steps", "60", "--output", str(tmp_path), "--resume", str(checkpoint), *options])
    printed = capsys.readouterr().out
    after = numbers_after("'loss':", printed)
    assert len(before) == 2 and before[1] < before[0]
    assert len(after) == 1 and after[0] < before[1]
    assert len(printed.splitlines()[-1]) > 0
    saved = torch.load(tmp_path / "checkpoint-60" / "optimizer.pt", weights_only=True)
    assert saved["state"][0]["step"] == 60
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-40", "checkpoint-60"]


def gpt2_trainer(folder: Path, poisoned: int | None = None, steps: int = 8, **options: Any) -> Any:
    """A trainer of the example's model; each step takes two batches of four blocks."""
    module = example("transformers_gpt2", "transformers")
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Poison(TrainerCallback):
        """Makes the gradients of a step nan, as an exploding loss would."""

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            if state.global_step == poisoned:
                next(given["model"].parameters()).grad.fill_(torch.nan)

    trainer_options = {
        name: options.pop(name)
        for name in ("optimizers", "optimizer_cls_and_kwargs")
        if name in options
    }
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **{"save_strategy": "no", **options},
    )
    torch.manual_seed(0)
    model = trainer_options.pop("model", None) or module.make_model()
    if callable(trainer_options.get("optimizers")):
        trainer_options["optimizers"] = trainer_options["optimizers"](model)
    data = module.make_data()[:100]
    return Trainer(model, arguments, train_dataset=data, callbacks=[Poison()], **trainer_options)


def trained(trainer: Any, **options: Any) -> Any:
    trainer.train(**options)
    return trainer.optimizer.optimizer  # within Accelerate's wrapper


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_transformers_clips_as_with_torchs_optimizer(tmp_path, bf16):
    optimizers = []
    for cls in (fusedopt.FusedAdamW, torch.optim.AdamW):
        options: Any = {"optimizer_cls_and_kwargs": (cls, {"lr": 1e-3, "weight_decay": 0.1})}
        trainer = gpt2_trainer(tmp_path, bf16=bf16, max_grad_norm=0.1, **options)
        optimizers.append(trained(trainer))
    assert type(optimizers[0]) is fusedopt.FusedAdamW
    assert len(optimizers[0].param_groups) == 2  # Trainer doesn't decay biases and norms
    torch.testing.assert_close(optimizers[0].grad_norm, torch.tensor(0.1), rtol=1e-3, atol=0)
    tolerance = ROUNDED if bf16 else 1e-5
    torch.testing.assert_close(*map(params_of, optimizers), rtol=1e-3, atol=tolerance)


def test_transformers_own_clipping_equals_the_trainers(tmp_path):
    """`optimizers=` with a scheduler; Trainer itself is told not to clip."""

    def pair(model: Any) -> Any:
        optimizer = fusedopt.FusedAdamW(model.parameters(), lr=1e-3, max_grad_norm=0.1)
        return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.1)

    own = trained(gpt2_trainer(tmp_path, max_grad_norm=0.0, optimizers=pair))
    assert own.param_groups[0]["lr"] == pytest.approx(1e-5) and own.grad_norm > 0.1

    def plain(model: Any) -> Any:
        optimizer = fusedopt.FusedAdamW(model.parameters(), lr=1e-3)
        return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.1)

    trainers = trained(gpt2_trainer(tmp_path, max_grad_norm=0.1, optimizers=plain))
    torch.testing.assert_close(params_of(own), params_of(trainers), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("clip", [0.0, 1.0], ids=["own clipping", "trainer's"])
def test_transformers_resumes_exactly_and_goes_on_after_a_nan(tmp_path, clip):
    own = {"max_grad_norm": 1.0} if clip == 0 else {"nonfinite": "skip"}
    options: Any = {
        "max_grad_norm": clip,
        "optimizer_cls_and_kwargs": (fusedopt.FusedAdamW, {"lr": 1e-3, **own}),
    }
    saving: Any = {"save_strategy": "steps", "save_steps": 4}
    whole = trained(gpt2_trainer(tmp_path, poisoned=5, **options, **saving))
    assert whole.skipped_steps == 1 and whole.state_dict()["state"][0]["step"] == 7
    assert all(p.isfinite().all() for p in params_of(whole))
    resumed = gpt2_trainer(tmp_path, poisoned=5, **options)
    checkpoint = str(tmp_path / "checkpoint-4")
    assert_same_bits(
        tensors_of(trained(resumed, resume_from_checkpoint=checkpoint)), tensors_of(whole)
    )


def test_transformers_makes_groups_that_are_named_afterwards(tmp_path):
    """Its checkpoints have the names, and a run without them goes on with these."""
    adamw = (fusedopt.FusedAdamW, {"lr": 1e-3, "max_grad_norm": 1.0, "telemetry": 2})
    options: Any = {"optimizer_cls_and_kwargs": adamw, "max_grad_norm": 0.0, "save_steps": 2}
    trainer = gpt2_trainer(tmp_path, steps=2, save_strategy="steps", **options)
    optimizer = trainer.create_optimizer()
    assert all("param_names" not in group for group in optimizer.param_groups)
    optimizer.name_params(trainer.model)
    names = {name for name, _ in trainer.model.named_parameters()}
    trained(trainer)
    assert optimizer.telemetry().params.keys() == names
    assert any(name in optimizer.explain() for name in names)
    again = gpt2_trainer(tmp_path, steps=3, save_strategy="steps", **options)
    resumed = trained(again, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.telemetry().params.keys() == names
    assert resumed.explain().startswith("step 3: ")
