"""Runs comparisons for pytest-benchmark: measures all libraries together, reports them one by one.

    pytest benchmarks --benchmark-only [--device cuda] [--threads 1,2] [--seconds 4] [--save]

A side is a library, or a variant of one. The first test of a case measures all sides in turn. Every
test then hands its own side's samples to pytest-benchmark, so that its tables, its JSON and
--benchmark-compare work as usual.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import results, tables
from benchmarks.comparisons import Comparison, Outcome
from benchmarks.peers import OURS
from benchmarks.timing import Effort, replay


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fusedopt")
    group.addoption("--device", default="cpu", choices=["cpu", "cuda"])
    group.addoption("--threads", help="numbers of threads, as in 1,2 (default: 1 and all)")
    group.addoption("--seconds", type=float, default=4.0, help="per case")
    group.addoption("--rounds", type=int, default=15, help="per case, at least")
    group.addoption("--save", nargs="?", const=results.FOLDER, type=Path, metavar="FOLDER",
                    help="write the samples here (default: benchmarks/results)")  # fmt: skip


def thread_counts(config: pytest.Config) -> list[int]:
    if config.option.device != "cpu":
        return [torch.get_num_threads()]
    asked = config.option.threads
    counts = map(int, asked.split(",")) if asked else (1, torch.get_num_threads())
    return sorted(set(counts))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "entry" not in metafunc.fixturenames:
        return
    module: Any = metafunc.module
    counts = thread_counts(metafunc.config)
    entries = [
        pytest.param(
            (comparison, threads, name), id=f"{comparison.title}, {threads} threads: {name}"
        )
        for comparison in module.COMPARISONS
        for threads in counts
        if threads == counts[-1] or comparison.any_threads
        for name in module.CONTENDERS
    ]
    metafunc.parametrize("entry", entries, indirect=True)


class Board:
    """The measurements of this session."""

    def __init__(self, config: pytest.Config) -> None:
        self.device: str = config.option.device
        self.effort = Effort(config.option.seconds, config.option.rounds)
        self.save_to: Path | None = config.option.save
        self.all_threads = torch.get_num_threads()
        self.outcomes: dict[tuple[Comparison, int], Outcome] = {}
        self.report: dict[str, Any] | None = None
        self.saved: Path | None = None

    def outcome(
        self, suite: str, comparison: Comparison, threads: int, sides: list[str]
    ) -> Outcome:
        if (comparison, threads) not in self.outcomes:
            self.report = self.report or results.new_report(self.device)
            torch.set_num_threads(threads)
            try:
                outcome = comparison.run(sides, self.device, self.effort)
            finally:
                torch.set_num_threads(self.all_threads)
            self.outcomes[comparison, threads] = outcome
            self.report["rows"] += outcome.rows(suite, comparison, threads)
            if self.save_to is not None:
                self.save(self.report, self.save_to)
        return self.outcomes[comparison, threads]

    def save(self, report: dict[str, Any], folder: Path) -> None:
        """Saves after every comparison, so that a long run that is stopped keeps its results."""
        before, suites = self.saved, {row["suite"] for row in report["rows"]}
        self.saved = results.save(report, suites, folder)
        if before not in (None, self.saved):  # named after fewer suites
            before.unlink()


@dataclass
class Entry:
    """One side of one comparison."""

    board: Board
    suite: str
    comparison: Comparison
    threads: int
    side: str
    sides: list[str]

    def record(self, benchmark: Any) -> None:
        """Measures the case, unless this is done, and hands over the samples of this side."""
        outcome = self.board.outcome(self.suite, self.comparison, self.threads, self.sides)
        if self.side not in outcome.samples:
            # Without ours no side runs.
            whose = self.side if self.side in outcome.skipped else OURS
            pytest.skip(f"{whose}: {outcome.skipped[whose]}")
        samples = outcome.samples[self.side]
        benchmark.group = f"{self.comparison.title}, {self.threads} threads"
        benchmark.extra_info.update(self.comparison.facts(), threads=self.threads, side=self.side)
        benchmark.pedantic(replay(samples), rounds=len(samples))


@pytest.fixture
def entry(request: pytest.FixtureRequest) -> Entry:
    comparison, threads, side = request.param
    module: Any = request.module
    board = request.config.stash[BOARD]
    return Entry(board, module.SUITE, comparison, threads, side, module.CONTENDERS)


BOARD = pytest.StashKey[Board]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[BOARD] = Board(config)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    board = config.stash[BOARD]
    if board.report is None:
        return
    for line in tables.as_text(board.report):
        terminalreporter.write_line(line)
    if board.saved is not None:
        terminalreporter.write_line(f"samples: {board.saved}")
