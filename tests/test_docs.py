"""The code in README.md and docs/ runs, except blocks of other libraries, marked "before"."""

from __future__ import annotations

import importlib
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import fusedopt

ROOT = Path(__file__).resolve().parent.parent
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def sections(path: Path) -> list[tuple[str, list[str]]]:
    """Each section's heading and its blocks of Python."""
    found = []
    for section in re.split(r"^(?=##? )", path.read_text(), flags=re.MULTILINE):
        heading = section.splitlines()[0].lstrip("# ") if section else ""
        blocks = re.findall(r"^```python\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)
        if blocks:
            found.append((heading, blocks))
    return found


SECTIONS = [
    pytest.param(heading, blocks, id=f"{path.name}: {heading}")
    for path in FILES
    for heading, blocks in sections(path)
]


CHECKPOINT = "checkpoint.pt"  # in the folder that a block runs in
# The variables of torchrun, for a single process. Port 0: any free one.
TORCHRUN = {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}


def apex_checkpoint(model: torch.nn.Module) -> dict[str, Any]:
    """A checkpoint as apex's FusedAdam writes it: the group has the step."""
    params = list(model.parameters())
    group = {"lr": 1e-3, "bias_correction": True, "betas": (0.9, 0.999), "eps": 1e-8}
    state = {
        index: {"exp_avg": torch.ones_like(p), "exp_avg_sq": torch.ones_like(p)}
        for index, p in enumerate(params)
    }
    groups = [{**group, "weight_decay": 0.1, "step": 7, "params": list(range(len(params)))}]
    return {"state": state, "param_groups": groups}


def bitsandbytes_checkpoint(model: torch.nn.Module) -> dict[str, Any]:
    """A checkpoint as the 32-bit AdamW of bitsandbytes writes it."""
    params = list(model.parameters())
    state = {
        index: {"step": 7, "state1": torch.ones_like(p), "state2": torch.ones_like(p)}
        for index, p in enumerate(params)
    }
    return {"state": state, "param_groups": [{"lr": 1e-3, "params": list(range(len(params)))}]}


def names_for(heading: str, folder: Path) -> dict[str, Any]:
    """The names that a block may use without defining them."""
    torch.manual_seed(0)
    model, inputs = torch.nn.Linear(8, 4), torch.randn(16, 8)
    names: dict[str, Any] = {
        "torch": torch,
        "fusedopt": fusedopt,
        "model": model,
        "device": "cpu",
        "inputs": inputs,
        "batches": DataLoader(TensorDataset(inputs, torch.arange(16) % 4), 4),
        "loss_function": torch.nn.functional.cross_entropy,
        "folder": str(folder),
        "apex_checkpoint": apex_checkpoint(model),
        "bitsandbytes_checkpoint": bitsandbytes_checkpoint(model),
    }
    if heading == "Resumed runs, and new ones":
        names["os"] = os
        opt = fusedopt.FusedAdamW(model.named_parameters(), telemetry=64)
        names["opt"] = opt
        torch.save({"model": model.state_dict(), "opt": opt.state_dict(), "step": 7}, CHECKPOINT)
    if "Hugging Face" in heading:
        pytest.importorskip("transformers")
        sys.path.insert(0, str(ROOT / "examples"))
        example = importlib.import_module("transformers_gpt2")
        names |= {"gpt2": example.make_model(), "dataset": example.make_data()[:32]}
    if "Lightning" in heading:
        pytest.importorskip("pytorch_lightning")
    if heading.startswith("JAX"):
        pytest.importorskip("jax")
    if "NumPy" in heading:
        pytest.importorskip("numpy")
    if "Keras" in heading:
        os.environ.setdefault("KERAS_BACKEND", "torch")
        pytest.importorskip("keras")
    if "TensorBoard" in heading:
        pytest.importorskip("tensorboard")
    if "Weights" in heading:
        names["run"] = SimpleNamespace(logged=[], define_metric=lambda *_, **__: None)
        names["run"].log = names["run"].logged.append
    if heading == "Accelerate":
        state = pytest.importorskip("accelerate.state")
        state.AcceleratorState._reset_state(reset_partial_state=True)
    return names


# Lightning walks batches with a function that torch deprecated, and advises on small data.
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")
@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:Precision bf16-mixed is not supported by the model summary")
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy")  # Keras
@pytest.mark.parametrize(("heading", "blocks"), SECTIONS)
def test_code_runs(heading, blocks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    names = names_for(heading, tmp_path / "output")
    for block in blocks:
        names["loss"] = names["model"](names["inputs"]).square().mean()
        exec(compile(block, f"<{heading}>", "exec"), names)
        if "DistributedDataParallel" in block:
            assert names["opt"].grad_norm > 0 and not names["opt"].step_skipped
        if "apex_checkpoint" in block or "bitsandbytes_checkpoint" in block:
            opt = names["opt"]
            names["loss"].backward()
            opt.step()
            assert opt.grad_norm > 0 and not opt.step_skipped
            states = opt.state_dict()["state"]
            assert [state["step"] for state in states.values()] == [8, 8]
            assert all((state["exp_avg"] > 0.5).all() for state in states.values())
    assert_monitored(heading, names, tmp_path)


@pytest.fixture(autouse=True)
def no_process_group():
    """A block may begin one; it ends with the block."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def assert_monitored(heading: str, names: dict[str, Any], folder: Path) -> None:
    """The files and values that docs/monitoring.md promises exist."""
    if heading == "To a file":
        assert names["log"].telemetry.step.tolist() == [1, 2, 3, 4]
        assert names["columns"]["grad_norm/weight"].gt(0).all()
    elif heading == "Resumed runs, and new ones":
        names["loss"].backward()
        names["opt"].step()
        names["monitor"].close()
        assert fusedopt.read_log(folder / "run.jsonl").telemetry.step.tolist() == [8]
    elif heading == "To TensorBoard":
        assert list((folder / "output").glob("events.*"))
    elif heading == "To Weights & Biases, or any logger":
        assert [row["optimizer/step"] for row in names["run"].logged] == [1]
    elif heading == "In Lightning":
        metrics = next((folder / "output").rglob("metrics.csv")).read_text().splitlines()
        assert "grad_norm" in metrics[0].split(",") and len(metrics) == 5
    elif heading == "In Hugging Face's Trainer":
        log = fusedopt.read_log(folder / "gpt2.jsonl")
        assert log.telemetry.step.tolist() == [1, 2]
        assert "transformer.h.0.attn.c_attn.weight" in log.telemetry.params


def test_every_name_in_the_docs_exists():
    for path in FILES:
        used = set(re.findall(r"fusedopt\.(\w+)", path.read_text()))
        modules = {"arrays", "egg", "jax", "keras", "reference"}
        missing = {name for name in used - modules if not hasattr(fusedopt, name)}
        assert not missing, f"{path.name} speaks of {missing}"


def test_the_api_page_has_every_public_name():
    page = (ROOT / "docs" / "api.md").read_text()
    written = re.findall(r"^::: fusedopt\.(\w+)", page, re.MULTILINE)
    assert set(written) == set(fusedopt.__all__)


def test_links_within_the_docs_lead_somewhere():
    for path in FILES:
        text = path.read_text()
        headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
        anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}
        for target in re.findall(r"\]\(#([^)]*)\)", text):
            assert target in anchors, f"{path.name} links to #{target}"
