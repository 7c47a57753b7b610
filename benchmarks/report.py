"""Draws the charts and writes the tables of README.md and docs/ from the results.

    python -m benchmarks.report

This program writes all text between `<!-- bench:NAME -->` and `<!-- /bench -->`, and reads only
benchmarks/results/*.json. For each device and suite, it uses the newest file.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import charts, results, tables

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/performance.md", "docs/precision.md", "docs/jax.md", "docs/keras.md")
IMAGES = Path("docs/images")
NOT_MEASURED = "Not measured yet."

Report = dict[str, Any]


def main(root: Path = ROOT, folder: Path = results.FOLDER) -> None:
    reports = newest(results.load_all(folder))
    for page in PAGES:
        path = root / page
        path.write_text(fill_in(path.read_text(), reports, path.parent, root / IMAGES))


def newest(reports: list[Report]) -> dict[tuple[str, str], Report]:
    """The newest report of each suite and device, with the rows of that suite only."""
    found: dict[tuple[str, str], Report] = {}
    for report in reports:
        for suite in {row["suite"] for row in report["rows"]}:
            rows = [row for row in report["rows"] if row["suite"] == suite]
            found[suite, report["device"]] = {**report, "rows": rows}
    return found


def fill_in(
    text: str, reports: dict[tuple[str, str], Report], page_folder: Path, images: Path
) -> str:
    """The page with every block replaced.

    Raises:
        ValueError: a block has an unknown name.
    """

    def block(match: re.Match[str]) -> str:
        name = match[1]
        if name not in BLOCKS:
            raise ValueError(f"unknown block {name!r}; there are {', '.join(BLOCKS)}")
        suite, write = BLOCKS[name]
        parts = []
        for device in ("cpu", "cuda"):
            report = reports.get((suite, device))
            if report is not None:
                parts.append(write(report, page_folder, images / f"{name}_{device}.svg"))
        written = "\n\n".join(filter(None, parts)) or NOT_MEASURED
        return f"<!-- bench:{name} -->\n{written}\n<!-- /bench -->"

    return re.sub(r"<!-- bench:(\S+) -->.*?<!-- /bench -->", block, text, flags=re.DOTALL)


def summary(report: Report, page_folder: Path, image: Path) -> str:
    return tables.origin(report) + "\n\n" + tables.summary(report)


def all_steps(report: Report, page_folder: Path, image: Path) -> str:
    return tables.origin(report) + "\n\n" + tables.steps(report)


def formats(report: Report, page_folder: Path, image: Path) -> str:
    return tables.origin(report) + "\n\n" + tables.formats(report)


def training(report: Report, page_folder: Path, image: Path) -> str:
    return tables.origin(report) + "\n\n" + tables.training(report)


def chart(
    draw: Callable[[Report, Path], bool | None], alt: str
) -> Callable[[Report, Path, Path], str]:
    def write(report: Report, page_folder: Path, image: Path) -> str:
        if draw(report, image) is False:
            return ""
        return f"![{alt}]({image.relative_to(page_folder).as_posix()})"

    return write


BLOCKS: dict[str, tuple[str, Callable[[Report, Path, Path], str]]] = {
    "summary": ("step", summary),
    "steps": ("step", all_steps),
    "ratios": ("step", chart(charts.draw_ratios, "time of a step against fusedopt's, by case")),
    "ceiling": ("step", chart(charts.draw_ceiling, "share of the memory ceiling, by case")),
    "sweep": ("sweep", chart(charts.draw_sweep, "time against elements and against tensors")),
    "norm": ("norm", all_steps),
    "training": ("training", training),
    "formats": ("formats", formats),
    "jax": ("jax", all_steps),
    **{f"keras_{name}": (f"keras_{name}", all_steps) for name in ("jax", "tensorflow", "torch")},
}

if __name__ == "__main__":
    main()
