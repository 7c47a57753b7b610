"""The message of a step over ranks: int64 numbers that ranks and devices add up.

The exact sum of squares comes first, in limbs (`exact_sum`), then counts. Integers add up to the
same bits in every order: rank order, ring or tree, and one mesh dimension after the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fusedopt.reference import exact_sum

LIMBS = exact_sum.LIMBS
COUNTS = (
    "infs",
    "nans",
    "found_inf",  # a rank asks for a skip
    "wide",
    "sharded",
    "refusals",
    "refusing",  # the number of the rank that refuses
    "digest",  # of what the rank was asked for
    "digest_squared",
    "ranks",
)
INFS, NANS, FOUND_INF, WIDE, SHARDED = range(LIMBS, LIMBS + 5)
REFUSALS, REFUSING, DIGEST, DIGEST_SQUARED, RANKS = range(LIMBS + 5, LIMBS + 10)
SIZE = LIMBS + len(COUNTS)


class Exchange(Protocol):
    """Adds up the messages of a step over ranks.

    Attributes:
        counted: by device, which chunks this rank counts: bool, shape (chunks,).
    """

    counted: list[Tensor]

    def __call__(self, messages: list[Tensor]) -> Tensor:
        """The total of all ranks, from this rank's messages by device."""
        ...


def write(chunk_sums: Tensor, counted: Tensor) -> Tensor:
    """The message of a device: int64, shape (SIZE,).

    Args:
        chunk_sums: sums of squares: float64, shape (chunks,).
        counted: which of them this rank adds to the sum: bool, shape (chunks,).
    """
    message = torch.zeros(SIZE, dtype=torch.int64, device=chunk_sums.device)
    message[:LIMBS] = exact_sum.to_limbs(chunk_sums[counted & chunk_sums.isfinite()])
    # Also of what is counted elsewhere: a copy that is broken here makes all ranks skip.
    message[INFS] = chunk_sums.isinf().sum()
    message[NANS] = chunk_sums.isnan().sum()
    return message


def sum_of_squares(total: Sequence[int]) -> float:
    """The sum that the total of all messages stands for, rounded once; inf or nan, if any is."""
    if total[NANS]:
        return math.nan
    return math.inf if total[INFS] else exact_sum.from_limbs(total[:LIMBS])


def is_agreed(total: Sequence[int]) -> bool:
    """Whether all ranks were asked for the same step.

    By Cauchy and Schwarz, the two sums fit together only if all digests are equal.
    """
    return total[RANKS] * total[DIGEST_SQUARED] == total[DIGEST] ** 2


def asks_for_skip(total: Tensor) -> Tensor:
    """1 if a rank asks for a skip or can't take the step, else 0: 0-d float32, without waiting."""
    agreed = total[RANKS] * total[DIGEST_SQUARED] == total[DIGEST] * total[DIGEST]
    return ((total[FOUND_INF] + total[REFUSALS] > 0) | ~agreed).float()
