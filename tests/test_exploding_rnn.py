"""The recurrent network's gradients explode without help, and clipping saves the run."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

import fusedopt

for library in ("matplotlib", "tqdm"):
    pytest.importorskip(library)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
exploding_rnn = importlib.import_module("exploding_rnn")

QUIET = ["--no-progress", "--backend", "reference", "--batch-size", "8"]
WAYS = [
    "torch, no clipping",
    "torch, clip_grad_norm_",
    "fusedopt, fixed",
    "fusedopt, Percentile",
    "fusedopt, ZScore",
    "fusedopt, PerTensor",
    "fusedopt, Unit",
]


@pytest.fixture(autouse=True)
def one_thread():
    """Threads on a busy machine wait for each other longer than they compute here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(capsys: pytest.CaptureFixture[str], out: Path, *options: str) -> dict[str, list[str]]:
    """The cells of the table that it prints, by the name of the way."""
    exploding_rnn.main([*QUIET, "--out", str(out), *options])
    lines = capsys.readouterr().out.splitlines()
    return {line[:24].strip(): line[24:].split() for line in lines[1:-1]}


def test_sgd_is_lost_without_clipping_and_learns_with_it(tmp_path, capsys):
    table = run(capsys, tmp_path, "--optimizer", "sgd", "--steps", "6")
    assert list(table) == WAYS
    assert table[WAYS[0]][:4] == ["lost", "in", "step", "2"]
    for way in WAYS[1:]:
        training, test, largest, *_ = map(float, table[way])
        assert 1 < training < 20 and 1 < test < 20 and largest > 100
    assert {path.name for path in tmp_path.iterdir()} >= {
        "exploding_rnn.png",
        "fusedopt-fixed.jsonl",
    }
    assert (tmp_path / "exploding_rnn.png").read_bytes().startswith(b"\x89PNG")
    log = fusedopt.read_log(tmp_path / "fusedopt-fixed.jsonl")
    assert log.telemetry.step.tolist() == [1, 2, 3, 4, 5, 6]
    assert "rnn.weight_hh_l0" in log.telemetry.params
    first = (tmp_path / "fusedopt-fixed.jsonl").read_text().splitlines()[0]
    assert json.loads(first)["optimizer"] == "FusedSGD"


def test_adam_meets_norms_that_are_thousands_of_times_the_limit(tmp_path, capsys):
    table = run(capsys, tmp_path, "--steps", "3")
    assert all(float(table[way][2]) > 1e4 for way in WAYS)
    assert float(table["fusedopt, fixed"][4]) >= 2  # clipped


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--steps", "0"], "argument --steps: 0 is not above 0"),
        (["--lr", "nan"], "argument --lr: nan is not above 0"),
        (["--optimizer", "lamb"], "invalid choice: 'lamb'"),
    ],
)
def test_options_that_can_not_be(tmp_path, capsys, options, words):
    with pytest.raises(SystemExit) as caught:
        exploding_rnn.main([*QUIET, "--out", str(tmp_path), *options])
    assert caught.value.code == 2 and words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
