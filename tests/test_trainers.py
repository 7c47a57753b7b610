"""The examples run, resume exactly and survive a nan; the trainers' own clipping and AMP work."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from cases import assert_same_bits, same_bits, snapshot, tensors_of
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fusedopt

# In 16 bits, roundings that differ in the last float32 bit soon differ in a 16-bit one.
ROUNDED = 1e-3

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

pytestmark = [
    # Lightning walks batches with a function that torch deprecated.
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    # transformers before 5 asks for autocast by its old name.
    pytest.mark.filterwarnings("ignore:`torch.cpu.amp.autocast.args....` is deprecated"),
    # Lightning advises: loaders of small data have no workers here.
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
]


@pytest.fixture(autouse=True)
def one_thread():
    """Threads on a busy machine wait for each other longer than they compute here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def same_environment():
    """Trainers pass settings on in variables: the bf16 of one would be the default of the next."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def example(name: str, library: str) -> ModuleType:
    """Imported in the test that needs it, as its library takes seconds."""
    pytest.importorskip(library)
    pytest.importorskip("sklearn")
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    return importlib.import_module(name)


@pytest.mark.parametrize(
    ("name", "library", "words"),
    [
        ("lightning_digits", "pytorch_lightning", "pip install pytorch-lightning scikit-learn"),
        ("accelerate_gru", "accelerate", "pip install accelerate scikit-learn"),
        ("transformers_gpt2", "transformers", "pip install transformers accelerate"),
        ("train_digits", "sklearn", "pip install numpy scikit-learn matplotlib tqdm"),
        ("exploding_rnn", "tqdm", "pip install numpy scikit-learn matplotlib tqdm"),
    ],
)
def test_an_example_without_its_library_says_how_to_install_it(name, library, words):
    script = f"""
import runpy, sys
sys.modules[{library!r}] = None
sys.path.insert(0, {str(EXAMPLES)!r})
sys.argv = [{f"{name}.py"!r}, "--help"]
runpy.run_path({str(EXAMPLES / f"{name}.py")!r}, run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"{name}.py needs {library}, which isn't installed: ")
    assert done.stderr.endswith(f"{words}\n")


def params_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]


def numbers_after(word: str, printed: str) -> list[float]:
    """The number after a word in each line that an example prints."""
    return [float(number) for number in re.findall(rf"{word}\W+([\d.]+)", printed)]


# Lightning


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


def digit_batches(poisoned: int | None = None, count: int = 12, size: int = 16) -> DataLoader:
    """The first digits; a nan in the batch of this number."""
    from digits_data import load_digits

    digits = load_digits()
    images, labels = digits.train_images[: count * size].clone(), digits.train_labels
    if poisoned is not None:
        images[poisoned * size, 0, 0, 0] = torch.nan
    return DataLoader(TensorDataset(images, labels[: count * size]), size)


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


# Hugging Face's Trainer


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


# Accelerate


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
