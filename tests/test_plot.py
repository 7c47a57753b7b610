"""`plot` draws runs of any length and kind into a picture of bounded size."""

from __future__ import annotations

import math
import struct
from typing import Any

import pytest
import torch
from log_rows import make_rows
from runs import FIRST_WITH_BIAS, HUGE, NAMES, SKIPPED, history_of, run_of
from test_log_reader import write

from fusedopt.__main__ import main

plot = pytest.importorskip("fusedopt.monitoring.plot")
pytest.importorskip("matplotlib")


def marks(axes: Any) -> dict[str, list[float]]:
    """Where the scattered marks of each kind are."""
    return {
        str(collection.get_label()): [float(x) for x in collection.get_offsets()[:, 0]]
        for collection in axes.collections
        if hasattr(collection, "get_offsets") and len(collection.get_offsets())
    }


def test_a_picture_marks_what_happened():
    figure = plot.draw(history_of(run_of(60)), "my run", "FusedSGD")
    norm, coef, lr, layers, *_ = figure.axes
    found = marks(norm)
    assert found["skipped"] == [SKIPPED] and found["clipped"] == [HUGE]
    assert norm.get_yscale() == "log" and coef.get_yscale() == "log"
    line = norm.lines[0].get_ydata()
    assert line[HUGE - 1] == 1e6 and math.isnan(line[SKIPPED - 1])
    assert "FusedSGD, 60 steps, 1 clipped (1.7%), 1 skipped, 3 parameters" in figure._suptitle._text
    assert [label.get_text() for label in layers.get_yticklabels()] == NAMES
    heat = layers.images[0].get_array()
    assert heat.shape == (3, 60)
    assert heat.mask[1].tolist() == [True] * (FIRST_WITH_BIAS - 1) + [False] * 50
    assert heat[2, HUGE - 1] == 1e6
    assert marks(layers) == {"inf or nan": [SKIPPED]}
    assert layers.collections[0].get_offsets()[0, 1] == 0
    assert lr.lines[0].get_ydata()[1] == pytest.approx(0.05)


def test_a_long_run_of_many_parameters_is_drawn_in_bounded_size():
    names = [f"h.{i}.{part}" for i in range(100) for part in ("w", "b", "c", "d", "e")]
    figure = plot.draw(history_of(run_of(3000, names), intervals=1024), "long")
    norm, *_, layers, _ = figure.axes
    assert len(norm.lines[0].get_xdata()) == 750
    assert len(layers.get_yticklabels()) <= plot.MOST_ROWS
    assert layers.get_xlabel() == "step (4 to a point)"
    assert len(marks(norm)["skipped"]) == 1
    assert max(norm.lines[0].get_ydata()) == 1e6
    assert float(layers.images[0].get_array().max()) == 1e6
    assert figure.get_size_inches().prod() < 12 * 18


@pytest.mark.parametrize("kind", ["all clipped", "all skipped", "zeros", "nan", "not logged"])
def test_odd_runs_are_drawn(tmp_path, kind):
    steps = 40
    readings = torch.tensor([[2.0, 0.5, 0.0]], dtype=torch.float64).repeat(steps, 1)
    params = torch.ones(steps, 6, 2, dtype=torch.float64)
    params[:, 2:4] = 0
    if kind == "all skipped":
        readings[:] = torch.tensor([math.inf, 0.0, 1.0])
        params[:, 0], params[:, 2] = math.inf, 1.0
    elif kind == "zeros":
        readings[:, 0], params[:, 0] = 0.0, 0.0
    elif kind == "nan":
        readings[:, :2], params[:, 0], params[:, 3] = math.nan, math.nan, 1.0
    elif kind == "not logged":
        params[torch.arange(1, steps + 1) % 10 != 0] = math.nan
    lr = torch.full((steps, 1), 0.1, dtype=torch.float64)
    step = torch.arange(1, steps + 1)
    rows = make_rows(step, readings, lr, {"a": 1, "b": 2}, params).telemetry()
    figure = plot.draw(history_of(rows), kind)
    norm, *_ = figure.axes
    figure.savefig(tmp_path / "out.png")
    texts = [text.get_text() for text in norm.get_legend().get_texts()]
    assert ("clipped" in texts) == (kind in ("all clipped", "zeros", "not logged"))
    assert ("skipped" in texts) == (kind == "all skipped")
    assert ("inf or nan, not skipped" in texts) == (kind == "nan")
    if kind == "not logged":  # the last that was logged is shown until the next
        heat = figure.axes[3].images[0].get_array()
        assert heat.mask[0].tolist() == [True] * 9 + [False] * 31


def test_plot_writes_a_png(tmp_path, capsys):
    log = write(tmp_path / "run.jsonl", run_of(50))
    assert main(["plot", str(log)]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'run.png'}\n"
    data = (tmp_path / "run.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", data[16:24])
    assert width == 1440 and 700 < height < 2400
    assert main(["plot", str(log), "-o", str(tmp_path / "other.svg")]) == 0
    assert (tmp_path / "other.svg").stat().st_size > 1000


def test_a_damaged_log_is_drawn_with_a_word(tmp_path, capsys):
    log = write(tmp_path / "run.csv", run_of(50))
    log.write_bytes(log.read_bytes()[:-10])
    assert main(["plot", str(log)]) == 0
    printed = capsys.readouterr()
    assert f"{log}, line 51: cut off in the middle" in printed.err
    assert len(printed.err.splitlines()) == 1
    assert (tmp_path / "run.png").exists()


@pytest.mark.parametrize(("output", "words"), [("no/out.png", "No such file"), ("x.abc", "abc")])
def test_a_picture_that_can_not_be_written(tmp_path, capsys, output, words):
    log = write(tmp_path / "run.jsonl", run_of(5))
    assert main(["plot", str(log), "-o", str(tmp_path / output)]) == 2
    error = capsys.readouterr().err
    assert words in error and len(error.splitlines()) == 1
