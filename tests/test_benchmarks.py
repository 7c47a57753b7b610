"""The benchmarks measure what they say: order, bytes, ceilings, reports."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import (
    cases,
    ceiling,
    charts,
    long_run,
    memory,
    report,
    results,
    tables,
    timing,
    traffic,
)
from benchmarks.cases import Case
from benchmarks.comparisons import (
    CEILING,
    FormatComparison,
    JaxComparison,
    KerasComparison,
    NormComparison,
    StepComparison,
    make_params,
)
from benchmarks.format_sides import FORMAT_SIDES
from benchmarks.jax_sides import JAX_SIDES
from benchmarks.keras_sides import KERAS_SIDES
from benchmarks.peers import OURS, SIDES, Unavailable, make_step

BRIEF = timing.Effort(seconds=0, rounds=2, warm_up=1)
SMALL = ((1000,), (24, 10))


def test_the_models_have_their_parameters():
    assert len(cases.gpt2_small()) == 148
    assert sum(map(prod, cases.gpt2_small())) == 124_439_808
    assert len(cases.resnet50()) == 161
    assert sum(map(prod, cases.resnet50())) == 25_557_032
    assert len(cases.llama_1b()) == 1 + 22 * 9 + 2
    assert sum(map(prod, cases.llama_1b())) == 1_100_048_384


@pytest.mark.parametrize("suite", [cases.step_cases, cases.gpu_cases])
def test_no_two_cases_share_a_title(suite):
    titles = [case.title for case in suite()]
    assert len(set(titles)) == len(titles)
    assert {case.optimizer for case in suite()} == set(cases.OPTIMIZERS)


def test_sides_take_turns_in_orders_that_change():
    log = []
    steps = {name: (lambda name=name: log.append(name)) for name in "abc"}
    samples = timing.interleaved(
        steps, "cpu", timing.Effort(0, rounds=60, warm_up=1), lambda: log.append("-")
    )
    assert log[:3] == ["a", "b", "c"]
    rounds = ["".join(log[at : at + 6]) for at in range(3, len(log), 6)]
    assert len(rounds) == 60 and set(rounds) == {
        f"-{x}-{y}-{z}" for x, y, z in itertools.permutations("abc")
    }
    assert {side: len(times) for side, times in samples.items()} == dict.fromkeys("abc", 60)


def test_the_replayed_clock_gives_back_the_samples():
    step = timing.replay([0.5, 0.25])
    times = []
    for _ in range(2):
        start = timing.replay_clock()
        step()
        times.append(timing.replay_clock() - start)
    assert times == [0.5, 0.25]


@pytest.mark.parametrize(
    ("side", "mode", "per_element"),
    [
        ("torch fused", "plain", 28),
        ("torch fused", "clip", 28 + 4 + 8),  # the norm, and the scaled gradients
        ("torch fused", "amp", 28 + 4 + 8 + 8),  # and the unscaled ones
    ],
)
def test_bytes_of_a_step(side, mode, per_element):
    case = Case("AdamW", "small", ((100_000,),), mode)
    step, _ = make_step(side, case, make_params(case, "cpu"))
    step()
    assert traffic.count(step) / case.elements == pytest.approx(per_element, rel=1e-3)


@pytest.mark.parametrize(
    ("optimizer", "plain"),
    [("AdamW", 28), ("RMSprop", 20), ("RMSprop centered with momentum", 36)],
)
def test_our_bytes(optimizer, plain):
    for mode, per_element in (("plain", plain), ("clip", plain + 4)):
        case = Case(optimizer, "small", SMALL, mode)
        outcome = StepComparison(case).run([OURS, CEILING], "cpu", BRIEF)
        assert outcome.bytes == dict.fromkeys((OURS, CEILING), per_element * case.elements)


def test_the_norm_is_compared_with_torchs_and_with_a_read():
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        case = Case("norm", "small", SMALL, "norm", dtype)
        outcome = NormComparison(case).run([OURS, "torch foreach", CEILING], "cpu", BRIEF)
        assert set(outcome.samples) == {OURS, "torch foreach", CEILING}
        assert outcome.bytes == dict.fromkeys((OURS, CEILING), size * case.elements)
        rows = outcome.rows("norm", NormComparison(case), 2)
        assert {row["mode"] for row in rows} == {"norm"}


def test_the_ceiling_of_a_norm_changes_nothing():
    array = torch.randn(300_007)
    before = array.clone()
    ceiling.on_cpu([array], measure=True)()
    assert torch.equal(array, before)


@pytest.mark.parametrize("written", [1, 3, 5])
def test_the_ceiling_touches_every_element(written):
    # Not a multiple of a block or a vector; -ffast-math contracts, hence the tolerance.
    arrays = [torch.randn(300_007) for _ in range(written + 1)]
    step = ceiling.on_cpu(arrays, measure=True)
    before = [array.clone() for array in arrays]
    step()
    for k in range(written):
        torch.testing.assert_close(arrays[k], before[k] * 0.5 + arrays[-1])
    assert torch.equal(arrays[-1], before[-1])


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("optimizer", cases.OPTIMIZERS)
def test_ours_and_torchs_take_the_same_steps(optimizer, mode):
    """A comparison of speed is one only if both sides do the same."""
    results_by_side = {}
    twin = "torch for-loop"  # foreach changes the gradients, with Nesterov momentum
    for side in (OURS, twin):
        torch.manual_seed(0)
        case = Case(optimizer, "small", SMALL, mode)
        params = make_params(case, "cpu")
        try:
            step, _ = make_step(side, case, params)
        except Unavailable as reason:
            pytest.skip(str(reason))
        for _ in range(3):
            step()
        results_by_side[side] = params
    torch.testing.assert_close(results_by_side[OURS], results_by_side[twin])


def test_a_side_that_is_not_there_is_skipped_by_name():
    case = Case("RMSprop", "small", SMALL)
    outcome = StepComparison(case).run([OURS, "torch fused", "DeepSpeed"], "cpu", BRIEF)
    assert list(outcome.samples) == [OURS]
    assert outcome.skipped["torch fused"] == "torch.optim.RMSprop has no fused"
    assert outcome.skipped["DeepSpeed"] == "DeepSpeed has no fused RMSprop"


def test_programs_of_jax_are_measured():
    pytest.importorskip("jax")
    pytest.importorskip("optax")
    case = Case("AdamW", "small", SMALL)
    comparison = JaxComparison(case)
    outcome = comparison.run([*JAX_SIDES], "cpu", BRIEF)
    if OURS in outcome.skipped:
        pytest.skip(outcome.skipped[OURS])
    assert {side: len(times) for side, times in outcome.samples.items()} == dict.fromkeys(
        JAX_SIDES, 2
    )
    rows = outcome.rows("jax", comparison, 1)
    assert [row["bytes"] for row in rows] == [32 * case.elements, None, None, None]


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy")
def test_steps_of_keras_are_measured():
    pytest.importorskip("keras_runs")
    case = Case("AdamW", "small", SMALL)
    outcome = KerasComparison(case).run([*KERAS_SIDES], "cpu", BRIEF)
    assert outcome.skipped == {}
    assert [len(times) for times in outcome.samples.values()] == [2, 2]


def test_formats_store_the_bytes_of_the_table():
    """docs/precision.md has it; a scale takes 1/16 of a byte, and a step needs next to nothing."""
    case = Case("AdamW", "one", ((2**18,),), "clip")
    comparison, sides = FormatComparison(case), [*FORMAT_SIDES]
    outcome = comparison.run(sides, "cpu", BRIEF)
    assert outcome.samples.keys() | outcome.skipped.keys() == set(sides)
    rows = outcome.rows("formats", comparison, 1)
    stored = {row["side"]: row["stored"] / case.elements for row in rows}
    expected = {
        OURS: 12, "float32 + 8bit": 6.125, "exact + float32": 12, "exact + bfloat16": 8,
        "24bit + bfloat16": 7, "24bit + 8bit": 5.125, "stochastic + 8bit": 4.125,
        "naive bfloat16": 6, "torch fused": 12, "torch fused, bfloat16": 6,
    }  # fmt: skip
    assert {side: stored[side] for side in expected} == pytest.approx(expected, abs=1e-3)
    for row in rows:
        assert row["peak"] is None or row["peak"] >= row["stored"]
    report_ = {**results.new_report("cpu"), "rows": rows}
    assert len(tables.formats(report_).splitlines()) == 2 + len(rows)
    assert "5.13 B/element stored" in "\n".join(tables.as_text(report_))


def test_the_extra_memory_of_a_step_is_that_of_its_temporary_tensors():
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux tells the peak")
    found = memory.extra_bytes(lambda: torch.ones(2**24).sum(), "cpu")
    assert found is None or abs(found - 2**26) < 2**22  # Linux counts pages in batches


def test_a_side_for_another_device_is_skipped_by_name():
    sides = [OURS, "Apex", "flashoptim 8-bit"]
    outcome = StepComparison(Case("AdamW", "small", SMALL)).run(sides, "cpu", BRIEF)
    assert list(outcome.samples) == [OURS]
    assert outcome.skipped == {
        "Apex": "Apex is for parameters on a GPU",
        "flashoptim 8-bit": "flashoptim is for parameters on a GPU",
    }


def test_a_variant_that_a_side_would_ignore_is_not_asked_of_it():
    case = Case("SGD with Nesterov momentum", "small", SMALL)
    outcome = StepComparison(case).run([OURS, "bitsandbytes"], "cpu", BRIEF)
    assert "without" in outcome.skipped["bitsandbytes"]


# What these libraries' files say of their arguments; they need a GPU themselves.
class TheirAdam(torch.optim.SGD):
    def __init__(self, params, lr=1e-3, weight_decay=0.0, adam_w_mode=True):
        super().__init__([torch.zeros(1)], lr=lr)
        self.asked = {"lr": lr, "weight_decay": weight_decay, "adam_w_mode": adam_w_mode}


@pytest.mark.parametrize(
    ("side", "module"), [("Apex", "apex.optimizers"), ("DeepSpeed", "deepspeed.ops.adam")]
)
@pytest.mark.parametrize(
    ("optimizer", "weight_decay", "decoupled"), [("AdamW", 1e-2, True), ("Adam", 0.0, False)]
)
def test_the_adams_of_a_gpu_are_asked_for_the_same(
    monkeypatch, side, module, optimizer, weight_decay, decoupled
):
    clipped = []
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(__name__=module, FusedAdam=TheirAdam))
    clipping = SimpleNamespace(
        __name__="apex.contrib.clip_grad", clip_grad_norm_=lambda *given: clipped.append(given)
    )
    for name in ("apex", "apex.contrib", "deepspeed", "deepspeed.ops"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    monkeypatch.setitem(sys.modules, "apex.contrib.clip_grad", clipping)
    on_gpu: Any = [SimpleNamespace(device=torch.device("cuda"))]
    step, made = make_step(side, Case(optimizer, "small", SMALL, "clip"), on_gpu)
    expected = {"lr": 1e-3, "weight_decay": weight_decay, "adam_w_mode": decoupled}
    assert isinstance(made, TheirAdam) and made.asked == expected
    if side == "Apex":
        step()
        assert clipped == [(on_gpu, 1.0)]


def made_up_report(device: str = "cpu") -> dict:
    """A report with made-up times, to test its form."""
    made_up = results.new_report("cpu")
    made_up |= {"device": device, "hardware": "made up"}
    comparisons = {
        "step": cases.step_cases()[:2],
        "sweep": [*cases.size_cases(), *cases.count_cases()],
    }
    for suite, suite_cases in comparisons.items():
        for case in suite_cases:
            for side, ns in ((OURS, 1_000_000), ("torch fused", 3_000_000), (CEILING, 500_000)):
                made_up["rows"].append(
                    {"suite": suite, **case.facts(), "threads": 2, "side": side,
                     "bytes": 32 * case.elements, "samples_ns": [ns, ns + 1000, ns + 2000]}
                )  # fmt: skip
    return made_up


def test_ratios_are_of_pairs():
    slow_machine = {"samples_ns": [10, 20, 1000]}
    assert results.ratio({"samples_ns": [30, 60, 3000]}, slow_machine) == (3, 3, 3)


def test_a_saved_report_comes_back_and_few_samples_are_kept(tmp_path):
    made_up = made_up_report()
    path = results.save(made_up, ["step"], tmp_path)
    assert results.load_all(tmp_path) == [made_up]
    assert path.name == f"step_cpu_{made_up['date'][:10]}.json"
    kept = results.kept([k * 1e-9 for k in range(1000)])
    assert len(kept) <= results.MAX_SAMPLES and kept[0] == 0 and kept[-1] > 900


def test_the_report_writes_pages_and_charts_from_results(tmp_path):
    (tmp_path / "docs").mkdir()
    for page in report.PAGES:
        (tmp_path / page).write_text((report.ROOT / page).read_text())
    results.save(made_up_report(), ["step", "sweep"], tmp_path / "results")
    report.main(tmp_path, tmp_path / "results")
    readme, page, *_ = ((tmp_path / name).read_text() for name in report.PAGES)
    assert "| AdamW, one tensor of 25M, clipped | 3 | 50% |" in readme
    assert "made up" in page and report.NOT_MEASURED in page
    images = sorted(path.name for path in (tmp_path / report.IMAGES).iterdir())
    assert images == ["ceiling_cpu.svg", "ratios_cpu.svg", "sweep_cpu.svg"]
    for image in images:
        assert f"images/{image}" in page
        assert "made up" in (tmp_path / report.IMAGES / image).read_text()
    report.main(tmp_path, tmp_path / "results")
    assert (tmp_path / "README.md").read_text() == readme  # again: the same


def test_the_committed_pages_are_those_of_the_committed_results(tmp_path):
    (tmp_path / "docs").mkdir()
    for page in report.PAGES:
        (tmp_path / page).write_text((report.ROOT / page).read_text())
    report.main(tmp_path)
    for page in report.PAGES:
        current = (report.ROOT / page).read_text()
        assert (tmp_path / page).read_text() == current, "run: make bench-report"


def test_an_unknown_block_is_refused():
    with pytest.raises(ValueError, match="unknown block 'nonsense'"):
        report.fill_in("<!-- bench:nonsense -->\n<!-- /bench -->", {}, Path(), Path())


def test_every_side_has_a_style():
    assert set(SIDES) - set(charts.STYLES) == {"fusedopt with its own scaler"}


def test_the_suite_hands_its_samples_to_pytest_benchmark(tmp_path):
    pytest.importorskip("pytest_benchmark")
    chosen = "elements and (fusedopt or ceiling) and 100"
    command = [sys.executable, "-m", "pytest", "benchmarks/test_sweep.py", "--benchmark-only",
               "-p", "no:cacheprovider", "-k", chosen, "--threads", "1", "--seconds", "0",
               "--rounds", "2", "--save", tmp_path / "saved",
               "--benchmark-json", tmp_path / "pytest.json"]  # fmt: skip
    # Not as a worker of this very run: pytest-benchmark measures nothing in one.
    env = {name: value for name, value in os.environ.items() if "XDIST" not in name}
    run = subprocess.run(command, cwd=report.ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    theirs = json.loads((tmp_path / "pytest.json").read_text())["benchmarks"]
    [saved] = results.load_all(tmp_path / "saved")
    for entry in theirs:
        facts = entry["extra_info"]
        [row] = [row for row in saved["rows"]
                 if (row["case"], row["side"]) == (facts["case"], facts["side"])]  # fmt: skip
        assert row["samples_ns"] == [round(1e9 * s) for s in entry["stats"]["data"]]
    assert len(theirs) >= 2
    assert tables.as_text(saved)[0] in run.stdout


def test_a_long_run_says_how_much_memory_it_took(tmp_path, capfd, monkeypatch):
    """Its motions; a million steps are for whoever asks."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(long_run, "EXPLODES", 100)
    long_run.main(["--steps", "300", "--log", str(tmp_path / "run.jsonl")])
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == long_run.LOOKS + 3
    assert all(re.fullmatch(r"step +\d+: +\d+\.\d MB, +\d+\.\d s", it) for it in lines[:-3])
    assert re.fullmatch(r"log: 0\.1 MB", lines[-3])
    assert lines[-2].startswith("read_log: 300 steps, 3 of them skipped; ")
    assert re.fullmatch(r"plot: wrote .*run\.png; \S+ s, at most \d+ MB", lines[-1])
    assert (tmp_path / "run.png").stat().st_size > 0
