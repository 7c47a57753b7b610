"""Groups parameters by module if there are too many to show."""

from __future__ import annotations

from collections.abc import Sequence


def gather(names: Sequence[str], most: int) -> list[tuple[str, list[int]]]:
    """Rows for a table of parameters, in their order: each a label and the parameters in it.

    A row holds all parameters whose names begin with the same parts. The number of these parts is
    the largest that gives at most `most` rows. If even one part gives more, neighboring rows are
    joined.
    """
    parts = [name.split(".") for name in names]
    low, high = 1, max(map(len, parts), default=1)
    while low < high:  # more parts never give fewer rows
        middle = (low + high + 1) // 2
        if len(_at_depth(parts, middle)) <= most:
            low = middle
        else:
            high = middle - 1
    rows = _at_depth(parts, low)
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


def _at_depth(parts: Sequence[Sequence[str]], depth: int) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = {}
    for index, name in enumerate(parts):
        rows.setdefault(".".join(name[:depth]), []).append(index)
    return rows
