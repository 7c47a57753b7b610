"""A `History` of any length fits in a picture, and keeps the extremes of a run."""

from __future__ import annotations

import math

import pytest
from log_rows import rows_of
from runs import FIRST_WITH_BIAS, SKIPPED, history_of, run_of

from fusedopt.monitoring.layers import gather
from fusedopt.monitoring.telemetry_rows import select


@pytest.mark.parametrize(
    ("steps", "batch"), [(1, 1), (10, 3), (64, 7), (65, 1), (100, 1), (100, 40), (5000, 1000)]
)
def test_a_history_of_any_length_keeps_what_stood_out(steps, batch):
    rows = run_of(steps)
    history = history_of(rows, batch)
    assert len(history) <= 64 and history.width * len(history) >= steps
    assert history.width == 2 ** max(0, math.ceil(math.log2(steps / 64)))
    assert history["steps"].sum() == steps
    assert history["skipped"].sum() == rows.skipped.sum()
    assert history["clipped"].sum() == ((rows.clip_coef < 1) & ~rows.skipped).sum()
    starts = history.starts()
    for i, start in enumerate(starts.tolist()):
        inside = (rows.step >= start) & (rows.step < start + history.width) & ~rows.skipped
        if inside.any():
            assert history["norm_max"][i] == rows.grad_norm[inside].max()
            assert history["norm_min"][i] == rows.grad_norm[inside].min()
            assert history["coef_min"][i] == rows.clip_coef[inside].min()
            assert history["lr"][i] == rows.lr[rows.step >= start][0]
    where = (SKIPPED - 1) // history.width
    if steps >= SKIPPED:
        assert history["param_bad"][where].tolist() == [1, 0, 0]
    assert history["param_bad"].nan_to_num(0).sum() == (steps >= SKIPPED)
    if history.width == 1 and steps >= SKIPPED:
        assert history["norm_max"][where].isnan()
    bias = history["param_max"][:, 1].isnan().nonzero().flatten()
    assert (bias * history.width < FIRST_WITH_BIAS).all()


def test_a_history_of_a_resumed_run_forgets_what_is_replaced():
    rows = run_of(40)
    history = history_of(rows)
    assert history["skipped"].sum() == 1
    again = select(run_of(26), slice(20, None))
    history.add(rows_of(again))
    assert history["steps"].tolist() == [1] * 26 and history["skipped"].sum() == 0
    history.add(rows_of(select(rows, slice(26, None))))
    assert history["steps"].tolist() == [1] * 40 and history["skipped"].sum() == 1


def test_a_history_in_which_parameters_and_groups_come_and_go():
    history = history_of(run_of(5, ["a", "b"]))
    rows = run_of(10, ["b", "c"], groups=2)
    history.add(rows_of(select(rows, slice(5, None))))
    history.add(rows_of(select(run_of(12, ["a"]), slice(10, None))))
    assert history.names == ["a", "b", "c"]
    known = ~history["param_max"].isnan()
    assert known[:, 0].tolist() == [True] * 5 + [False] * 5 + [True] * 2
    assert known[:, 2].tolist() == [False] * 12  # in its first steps it has no gradient
    assert history["param_max"][7, 1] == rows.params["b"].grad_norm[7]
    assert history["lr"][:, 1].isnan().tolist() == [True] * 5 + [False] * 5 + [True] * 2


# Rows of a heat map


def test_parameters_are_gathered_by_module():
    names = [f"h.{i}.{part}.{kind}" for i in range(3) for part in "ab" for kind in "wx"]
    assert gather(names, 12) == [(name, [i]) for i, name in enumerate(names)]
    by_part = gather(names, 11)
    assert [label for label, _ in by_part] == [f"h.{i}.{part}" for i in range(3) for part in "ab"]
    assert by_part[1] == ("h.0.b", [2, 3])
    assert gather(names, 5) == [(f"h.{i}", list(range(4 * i, 4 * i + 4))) for i in range(3)]
    assert gather(names, 1) == [("h", list(range(12)))]
    assert gather([], 5) == []


def test_parameters_without_modules_are_gathered_by_neighborhood():
    rows = gather([str(i) for i in range(100)], 40)
    assert rows[0] == ("0 and 2 more", [0, 1, 2]) and rows[-1] == ("99 and 0 more", [99])
    assert [index for _, members in rows for index in members] == list(range(100))
