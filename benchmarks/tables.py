"""Results as tables: for the terminal, and in Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from benchmarks.comparisons import CEILING
from benchmarks.peers import OURS
from benchmarks.results import Row, median_seconds, ratio


def by_case(rows: list[Row]) -> Iterator[tuple[Row, dict[str, Row]]]:
    """Each case that has a row of ours: this row, and all rows by side."""
    for _, group in groupby(rows, key=lambda row: (row["suite"], row["case"], row["threads"])):
        sides = {row["side"]: row for row in group}
        if OURS in sides:
            yield sides[OURS], sides


def as_text(report: dict[str, Any]) -> list[str]:
    """Every row: its time, its time divided by ours, bytes per element, share of the ceiling."""
    lines = [f"{report['hardware']}, {report['date']}, commit {report['commit']}"]
    for ours, sides in by_case(report["rows"]):
        lines += ["", f"{ours['case']}, {ours['threads']} threads"]
        lines += [text_row(row, ours, sides.get(CEILING)) for row in sides.values()]
    return lines


def text_row(row: Row, ours: Row, ceiling: Row | None) -> str:
    seconds = median_seconds(row)
    line = f"  {row['side']:30}{seconds * 1e3:11.4f} ms"
    low, middle, high = ratio(row, ours)
    line += " " * 24 if row is ours else f"{middle:9.2f} x ({low:.2f} to {high:.2f})".ljust(24)
    if "units" in row:
        line += f"{row['units'] / seconds:12,.0f} {row['unit']}/s"
    if row.get("bytes"):
        line += f"{row['bytes'] / row['elements']:7.1f} B/element"
        line += f"{row['bytes'] / seconds / 1e9:8.1f} GB/s"
    if "stored" in row:
        line += f"  {stored(row)} B/element stored, {peak(row) or '?'} at most"
    if ceiling is not None and row is not ceiling:
        line += f"{1 / ratio(row, ceiling)[1]:7.0%} of the ceiling"
    return line


def origin(report: dict[str, Any]) -> str:
    """The hardware, version and date of a measurement."""
    return (
        f"{report['hardware']}; torch {report['versions']['torch']}; {report['date'][:10]}, "
        f"commit {report['commit']}."
    )


def markdown(header: list[str], body: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def peers_in(report: dict[str, Any]) -> list[str]:
    found = dict.fromkeys(row["side"] for row in report["rows"])
    return [side for side in found if side not in (OURS, CEILING)]


def share(row: Row, ceiling: Row | None) -> str:
    return "" if ceiling is None else f"{ratio(ceiling, row)[1]:.0%}"


def stored(row: Row) -> str:
    """Bytes per element of parameters and states."""
    return f"{row['stored'] / row['elements']:.2f}"


def peak(row: Row) -> str:
    return "" if row["peak"] is None else f"{row['peak'] / row['elements']:.2f}"


SUMMARY = (
    "AdamW, one tensor of 25M",
    "AdamW, one tensor of 25M, clipped",
    "AdamW, one tensor of 25M, bfloat16, clipped",
    "AdamW, GPT-2 small, clipped",
    "AdamW, 1,000 tensors of 64, clipped",
    "RMSprop, one tensor of 25M, clipped",
    "NAdam, one tensor of 25M, clipped",
    "SGD, one tensor of 25M, clipped",
)


def summary(report: dict[str, Any]) -> str:
    """The times of torch's variants divided by ours, in the cases of `SUMMARY`."""
    torchs = [side for side in peers_in(report) if side.startswith("torch ")]
    most_threads = max(row["threads"] for row in report["rows"])
    body = []
    for ours, sides in by_case(report["rows"]):
        if ours["case"] not in SUMMARY or ours["threads"] != most_threads:
            continue
        ratios = [f"{ratio(sides[side], ours)[1]:.3g}" if side in sides else "" for side in torchs]
        body.append([ours["case"], *ratios, share(ours, sides.get(CEILING))])
    return markdown(["times as fast as", *torchs, "share of the ceiling"], body)


def steps(report: dict[str, Any]) -> str:
    """Every case: our time, and every peer's ratio with its quartiles."""
    body = []
    for ours, sides in by_case(report["rows"]):
        name = f"{ours['case']}, {ours['threads']} threads"
        for row in sides.values():
            low, middle, high = ratio(row, ours)
            per_element = f"{row['bytes'] / row['elements']:.3g}" if row["bytes"] else ""
            body.append(
                [name, row["side"], f"{median_seconds(row) * 1e3:.4g}",
                 f"{middle:.3g}" + ("" if row is ours else f" ({low:.3g} to {high:.3g})"),
                 per_element, "" if row["side"] == CEILING else share(row, sides.get(CEILING))]
            )  # fmt: skip
            name = ""
    header = ["case", "side", "ms", "times ours", "bytes per element", "share of the ceiling"]
    return markdown(header, body)


def formats(report: dict[str, Any]) -> str:
    """Every side's time, the ratio with its quartiles, and the bytes that it holds."""
    body = []
    for ours, sides in by_case(report["rows"]):
        name = f"{ours['case']}, {ours['threads']} threads"
        for row in sides.values():
            low, middle, high = ratio(row, ours)
            times = f"{middle:.3g}" + ("" if row is ours else f" ({low:.3g} to {high:.3g})")
            milliseconds = f"{median_seconds(row) * 1e3:.4g}"
            body.append([name, row["side"], milliseconds, times, stored(row), peak(row)])
            name = ""
    header = ["case", "weights + states", "ms", "times ours in float32", "bytes stored", "at most"]
    return markdown(header, body)


def training(report: dict[str, Any]) -> str:
    """Tokens or images per second with our optimizer and with torch's."""
    body = []
    for ours, sides in by_case(report["rows"]):
        for side, row in sides.items():
            if side == OURS:
                continue
            rates = [f"{it['units'] / median_seconds(it):,.0f}" for it in (ours, row)]
            low, middle, high = ratio(row, ours)
            body.append([ours["case"], str(ours["threads"]), ours["unit"], *rates,
                         f"{middle:.3f} ({low:.3f} to {high:.3f})"])  # fmt: skip
    header = ["run", "threads", "a second", "fusedopt", "torch", "times as fast"]
    return markdown(header, body)
