"""The message of a step: one SUM all-reduce of integers, after which all ranks know the same.

The sum of squares travels exactly, in limbs (`reference.exact_sum`), beside counts. Integers add up
to the same bits in every order: rank order, ring or tree, and one mesh dimension after the other.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fusedopt.distributed.ranks import Ranks
from fusedopt.reference import exact_sum

LIMBS = exact_sum.LIMBS
INFS, NANS, FOUND_INF, WIDE, REFUSALS, DIGEST, DIGEST_SQUARED = range(LIMBS, LIMBS + 7)
SIZE = LIMBS + 7

_DIGEST_BITS = 24  # a square summed over 2**15 ranks still fits into an int64


class PeerError(RuntimeError):
    """Another rank refused this step, or was asked for another one; nothing was changed here.

    Attributes:
        ranks: the global ranks that refused, or all ranks where they disagree.
    """

    def __init__(self, message: str, ranks: list[int]) -> None:
        super().__init__(message)
        self.ranks = ranks

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.ranks)


class Exchange:
    """One step's message. Every rank sends exactly one: its sums, or that it refuses.

    Args:
        ranks: who steps together.
        counted: by device, which chunks this rank adds to the sum: bool, shape (chunks,).
        asked: what this rank was asked for, in words; all ranks must have been asked for the same.
        found_inf: None, or one float32: this rank asks for a skip if it is not 0.

    Attributes:
        sent: whether this rank has sent its message.
        is_wide: whether this rank's result is float64; after the message, whether any rank's is.
        found_inf: after the message, 1 if any rank asks for a skip, else 0: 0-d float32.
    """

    def __init__(self, ranks: Ranks, asked: str, found_inf: Tensor | None) -> None:
        self.sent = False
        self.is_wide = False
        self.found_inf = torch.zeros((), dtype=torch.float32)
        self.counted: list[Tensor] = []
        self._asks_for_skip = found_inf is not None and found_inf.float().item() != 0
        self._ranks = ranks
        self._asked = asked

    def __call__(self, chunk_sums: list[Tensor]) -> float:
        """The sum of squares over all ranks, from the sums of this rank's chunks, by device.

        Raises:
            PeerError: a rank refused, or the ranks were asked for different steps.
        """
        message = torch.zeros(SIZE, dtype=torch.int64)
        for sums, counted in zip(chunk_sums, self.counted, strict=True):
            sums = sums.detach().cpu()[counted]
            finite = sums.isfinite()
            message[:LIMBS] += exact_sum.to_limbs(sums[finite])
            message[NANS] += sums.isnan().sum()
            message[INFS] += sums.isinf().sum()
        message[FOUND_INF] = int(self._asks_for_skip)
        message[WIDE] = int(self.is_wide)
        total = self._send(message)
        if total[REFUSALS]:
            self._raise_refusals(self._ranks.gather(None))
        self._check_asked(total)
        self.found_inf.fill_(float(total[FOUND_INF] > 0))
        self.is_wide = total[WIDE] > 0
        if total[NANS]:
            return math.nan
        return math.inf if total[INFS] else exact_sum.from_limbs(total[:LIMBS])

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Makes sure that this rank sends its message: one that fails before it refuses."""
        try:
            yield
        except PeerError:
            raise
        except Exception as error:
            if not self.sent:
                self.refuse(error)
            raise

    def refuse(self, error: Exception) -> None:
        """Joins for a rank that can't step, so that nobody waits for it, and names its error."""
        message = torch.zeros(SIZE, dtype=torch.int64)
        message[REFUSALS] = 1
        self._send(message)
        self._ranks.gather(f"{type(error).__name__}: {error}")

    def _send(self, message: Tensor) -> list[int]:
        self.sent = True
        digest = zlib.crc32(self._asked.encode()) & ((1 << _DIGEST_BITS) - 1)
        message[DIGEST], message[DIGEST_SQUARED] = digest, digest * digest
        message = message.to(self._ranks.device)
        for group in self._ranks.groups:
            dist.all_reduce(message, group=group)
        return message.tolist()

    def _raise_refusals(self, errors: Sequence[tuple[int, str | None]]) -> None:
        refused = [(rank, error) for rank, error in errors if error is not None]
        told = "; ".join(f"rank {rank} refused this step: {error}" for rank, error in refused)
        raise PeerError(f"{told}. Nothing has been changed here", [rank for rank, _ in refused])

    def _check_asked(self, total: list[int]) -> None:
        """By Cauchy and Schwarz, the two sums fit together only if all digests are equal."""
        if self._ranks.size * total[DIGEST_SQUARED] == total[DIGEST] ** 2:
            return
        asked = self._ranks.gather(self._asked)
        told = "; ".join(f"rank {rank} has {it}" for rank, it in asked)
        raise PeerError(
            f"the ranks were asked for different steps: {told}; expected the same on all. Nothing "
            "has been changed",
            [rank for rank, _ in asked],
        )
