"""Parameters gathered under the modules that they belong to, where there are too many to show."""

from __future__ import annotations

from collections.abc import Sequence


def gather(names: Sequence[str], most: int) -> list[tuple[str, list[int]]]:
    """Rows for a table of parameters, in their order: each a label and the parameters in it.

    As many levels of the names as give no more than `most` rows; where not even the outermost do,
    neighbors are put together.
    """
    levels = max((name.count(".") + 1 for name in names), default=1)
    rows = _at_depth(names, levels)
    while len(rows) > most and levels > 1:
        levels -= 1
        rows = _at_depth(names, levels)
    if len(rows) <= most:
        return list(rows.items())
    size = -(-len(rows) // most)
    labels, members = list(rows), list(rows.values())
    return [
        (
            f"{labels[i]} and {min(size, len(labels) - i) - 1} more",
            [index for row in members[i : i + size] for index in row],
        )
        for i in range(0, len(labels), size)
    ]


def _at_depth(names: Sequence[str], levels: int) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        rows.setdefault(".".join(name.split(".")[:levels]), []).append(index)
    return rows
