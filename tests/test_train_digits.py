"""The example trains, resumes exactly, survives explosions, and explains a malformed file."""

from __future__ import annotations

import importlib
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

for library in ("matplotlib", "sklearn", "tqdm"):
    pytest.importorskip(library)

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "examples" / "train_digits.py"
sys.path.insert(0, str(SCRIPT.parent))

train_digits = importlib.import_module("train_digits")

HEADER = "label,a,b,c,d"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def one_thread():
    """Threads on a busy machine wait for each other longer than they compute here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(out: Path, *options: str) -> dict:
    """Train, and return the checkpoint."""
    train_digits.main(["--out", str(out), *options])
    return torch.load(out / "checkpoint.pt", weights_only=True)


def error_of(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """What the program says on its way out with status 2."""
    with pytest.raises(SystemExit) as caught:
        train_digits.main(options)
    assert caught.value.code == 2
    return capsys.readouterr().err


def write_csv(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


def striped_digits(path: Path, side: int, labels: list[int], rows: int = 200) -> Path:
    """Images that are easy to learn: each label has its own bright line."""
    noise = random.Random(0)
    lines = ["label," + ",".join(f"pixel{i}" for i in range(side * side))]
    for row in range(rows):
        kind = row % len(labels)
        pixels = [
            noise.randint(-20, 20) + (500 if index // side == kind else 0)
            for index in range(side * side)
        ]
        lines.append(",".join(map(str, [labels[kind], *pixels])))
    return write_csv(path, "\n".join(lines) + "\n")


def test_the_defaults_reach_97_percent_and_write_their_results(tmp_path, capsys):
    checkpoint = run(tmp_path)
    printed = capsys.readouterr()
    assert checkpoint["epochs"][-1]["test_accuracy"] >= 0.97
    assert len(checkpoint["steps"]["grad_norm"]) == checkpoint["epochs"][-1]["step"]
    assert (tmp_path / "training.png").read_bytes().startswith(PNG_SIGNATURE)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint.pt", "training.png"]
    assert len(printed.out.splitlines()) == 1 + 20 + 2
    assert printed.err == ""  # no progress bar where nobody watches


@pytest.mark.parametrize("optimizer", ["fused-adamw", "fused-rmsprop", "adam", "rmsprop"])
def test_each_optimizer_learns(tmp_path, optimizer):
    checkpoint = run(tmp_path, "--optimizer", optimizer, "--epochs", "4")
    assert checkpoint["epochs"][-1]["test_accuracy"] > 0.9


@pytest.mark.parametrize("optimizer", ["fused-adam", "adam"])
@pytest.mark.parametrize(("limit", "clips"), [("0.5", True), ("inf", False)])
def test_the_norm_is_noted_with_and_without_clipping(tmp_path, optimizer, limit, clips):
    options = ("--optimizer", optimizer, "--max-grad-norm", limit, "--epochs", "2")
    steps = run(tmp_path, *options)["steps"]
    assert all(norm > 0 for norm in steps["grad_norm"])
    assert any(steps["clipped"]) is clips
    assert not any(steps["skipped"])


@pytest.mark.parametrize("optimizer", ["fused-adam", "fused-adamw", "fused-rmsprop", "adamw"])
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(tmp_path, optimizer):
    options = ["--optimizer", optimizer, "--batch-size", "100", "--max-grad-norm", "0.7"]
    whole = run(tmp_path / "whole", *options, "--epochs", "4")
    run(tmp_path / "half", *options, "--epochs", "2")
    torch.rand(3)  # whatever else has happened to the generator
    resumed = run(
        tmp_path / "resumed", "--resume", str(tmp_path / "half/checkpoint.pt"), "--epochs", "4"
    )
    for name, weight in whole["network"].items():
        assert torch.equal(weight, resumed["network"][name]), name
    for index, state in whole["optimizer"]["state"].items():
        for name, value in state.items():
            other = resumed["optimizer"]["state"][index][name]
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other)), name
    assert whole["steps"] == resumed["steps"]
    assert torch.equal(whole["rng"], resumed["rng"])
    assert torch.equal(whole["order"], resumed["order"])


def test_a_resumed_run_stays_in_its_folder_and_keeps_its_settings(tmp_path, capsys):
    data = striped_digits(tmp_path / "data.csv", side=3, labels=[0, 1])
    run(tmp_path / "run", "--data", str(data), "--epochs", "1", "--lr", "0.01")
    checkpoint = tmp_path / "run/checkpoint.pt"
    train_digits.main(["--resume", str(checkpoint), "--epochs", "2"])
    assert len(torch.load(checkpoint, weights_only=True)["epochs"]) == 2
    capsys.readouterr()

    resume = ("--resume", str(checkpoint))
    assert "has 2 epochs; ask for more" in error_of(capsys, *resume, "--epochs", "2")
    assert "--lr is 0.01 in the checkpoint" in error_of(capsys, *resume, "--lr", "0.02")
    assert "cannot go with --resume" in error_of(capsys, *resume, "--explode")
    striped_digits(data, side=3, labels=[0, 2])
    assert "trained on other data" in error_of(capsys, *resume, "--epochs", "3")


@pytest.mark.parametrize("content", [None, b"", b"not a checkpoint", {"other": 1}])
def test_a_bad_checkpoint_gets_one_line(tmp_path, capsys, content):
    path = tmp_path / "checkpoint.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    message = error_of(capsys, "--resume", str(path))
    assert message.count("\n") == 1
    reason = "No such file" if content is None else "not a checkpoint of train_digits.py"
    assert f"{path}: {reason}" in message


@pytest.mark.parametrize("optimizer", ["fused-adam", "fused-adamw"])
def test_training_survives_explosions(tmp_path, capsys, optimizer):
    options = ["--epochs", "8", "--optimizer", optimizer, "--no-progress", "--out", str(tmp_path)]
    train_digits.main([*options, "--explode", "60", "90", "200"])
    lines = capsys.readouterr().out.splitlines()
    table = {line[:30].strip(): line[30:].split() for line in lines[-6:-1]}
    ours, theirs = (float(cell.strip("%")) for cell in table["test accuracy"])
    assert ours > 90
    assert theirs < 50
    survived, lost = next(cells for name, cells in table.items() if name.startswith("non-finite"))
    assert int(survived) == 0
    assert int(lost) > 0
    assert table["skipped steps"] == ["3", "0"]
    assert int(table["clipped steps"][0]) >= 3
    assert (tmp_path / "explode.png").read_bytes().startswith(PNG_SIGNATURE)


def test_an_explosion_changes_nothing_before_it_and_the_skipped_step_nothing_at_all():
    digits = train_digits.load_digits()
    run = train_digits.Run(digits, train_digits.Settings(), torch.device("cpu"))
    images, labels = run.digits.train_images[:32], run.digits.train_labels[:32]
    before = {name: weight.clone() for name, weight in run.network.state_dict().items()}
    for explosion, changes in (("gradient", False), ("loss", True)):
        run.optimizer.zero_grad()
        run.backward(torch.nn.functional.cross_entropy(run.network(images), labels), explosion)
        norm, skipped = run.update()
        assert bool(skipped) is not changes
        assert bool(norm.isfinite()) is changes
        same = all(torch.equal(run.network.state_dict()[name], before[name]) for name in before)
        assert same is not changes
    assert run.nonfinite_weights() == 0


def test_explosions_must_fit_into_the_run(tmp_path, capsys):
    data = striped_digits(tmp_path / "data.csv", side=3, labels=[0, 1])
    options = ("--data", str(data), "--epochs", "1", "--out", str(tmp_path), "--explode", "5")
    assert "--explode: step 5 is not before the last step, 5" in error_of(capsys, *options)


@pytest.mark.parametrize(("side", "labels"), [(6, [-7, 3, 10**30]), (1, [0, 1])])
def test_a_csv_of_any_size_range_and_labels_is_learned(tmp_path, side, labels):
    data = striped_digits(tmp_path / "data.csv", side, labels)
    checkpoint = run(tmp_path, "--data", str(data), "--epochs", "6", "--lr", "0.01")
    assert checkpoint["epochs"][-1]["test_accuracy"] > 0.9


def test_a_csv_may_come_from_anywhere(tmp_path):
    """Windows' line ends and mark, blank lines, quotes, a label in the middle, huge pixels."""
    text = 'a,b, label,c,d\r\n1,2,7,3,3e38\r\n\r\n"1",-3e38,"7.0",3,4\r\n5,6,8,7,8\r\n'
    digits = train_digits.read_csv(write_csv(tmp_path / "data.csv", text, "utf-8-sig"))
    assert digits.classes == [7, 8]
    pixels = torch.cat([digits.train_images, digits.test_images])
    assert pixels.shape == (3, 1, 2, 2)
    assert (pixels.min(), pixels.max()) == (0, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    {
        "empty": ("", ": the file is empty"),
        "blank": ("\n\n", ": the file is empty"),
        "only a header": (HEADER + "\n", ": 0 rows below the header; at least 2 are needed"),
        "one label": (
            HEADER + "\n7,2,3,4,5\n7,3,4,5,6\n",
            ": every label is 7; at least 2 different ones are needed",
        ),
        "no label": (
            "a,b,c,d\n1,2,3,4\n",
            ", line 1: the header has 0 columns named 'label', not 1",
        ),
        "two labels": (
            "label,label\n1,2\n",
            ", line 1: the header has 2 columns named 'label', not 1",
        ),
        "not square": (
            "label,a,b,c\n1,2,3,4\n",
            ", line 1: 3 pixel columns do not make a square image",
        ),
        "no pixels": ("label\n1\n2\n", ", line 1: 0 pixel columns do not make a square image"),
        "short row": (
            HEADER + "\n1,2,3,4,5\n1,2,3,4\n",
            ", line 3: 4 cells, but the header has 5 columns",
        ),
        "long row, blank lines": (
            HEADER + "\n\n\n1,2,3,4,5,6\n",
            ", line 4: 6 cells, but the header has 5 columns",
        ),
        "not a number": (
            HEADER + "\r\n1,2,3,4,5\r\n1,2,3,4x,5\r\n",
            ", line 3, column 'c': '4x' is not a finite number",
        ),
        "after a cell of two lines": (
            HEADER + '\n1,2,3,4,"5\n"\n1,2,3,,5\n',
            ", line 4, column 'c': '' is not a finite number",
        ),
        "nan": (HEADER + "\n1,nan,3,4,5\n", ", line 2, column 'a': 'nan' is not a finite number"),
        "inf": (HEADER + "\n1,2,3,4,-inf\n", ", line 2, column 'd': '-inf' is not a finite number"),
        "too large": (
            HEADER + "\n1,2,1e39,4,5\n",
            ", line 2, column 'b': '1e39' is not a finite number",
        ),
        "empty cells": (HEADER + "\n,,,,\n", ", line 2, column 'label': '' is not an integer"),
        "fractional label": (
            HEADER + "\n1,2,3,4,5\n1.5,2,3,4,5\n",
            ", line 3, column 'label': '1.5' is not an integer",
        ),
        "infinite label": (
            HEADER + "\ninf,2,3,4,5\n",
            ", line 2, column 'label': 'inf' is not an integer",
        ),
    }.values(),
)
def test_a_malformed_csv_gets_one_line(tmp_path, capsys, text, message):
    path = write_csv(tmp_path / "data.csv", text)
    options = ("--data", str(path), "--out", str(tmp_path))
    assert error_of(capsys, *options) == f"train_digits.py: error: {path}{message}\n"


def test_a_file_that_is_no_csv_gets_one_line(tmp_path, capsys):
    missing = error_of(capsys, "--data", str(tmp_path / "missing.csv"), "--out", str(tmp_path))
    assert missing.endswith("missing.csv: No such file or directory\n")
    binary = write_csv(tmp_path / "data.csv", HEADER + "é", "latin-1")
    message = error_of(capsys, "--data", str(binary), "--out", str(tmp_path))
    assert message.endswith("data.csv: not a text file in UTF-8\n")


@pytest.mark.parametrize(
    "options",
    [
        ["--optimizer", "sgd"],
        ["--epochs", "0"],
        ["--epochs", "two"],
        ["--lr", "-1"],
        ["--lr", "nan"],
        ["--batch-size", "0"],
        ["--max-grad-norm", "0"],
        ["--seed", str(2**64)],
        ["--device", "abacus"],
        ["--explode", "0"],
    ],
)
def test_a_bad_option_is_named(capsys, options):
    assert f"error: argument {options[0]}: " in error_of(capsys, *options)


def test_the_script_runs_from_anywhere(tmp_path):
    command = [sys.executable, str(SCRIPT), "--data", "missing.csv"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "train_digits.py: error: missing.csv: No such file or directory\n"
