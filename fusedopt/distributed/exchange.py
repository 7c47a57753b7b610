"""The message of a step: one SUM all-reduce of integers, after which all ranks know the same.

The sum of squares travels exactly, in limbs (`reference.exact_sum`), beside counts. Integers add up
to the same bits in every order: rank order, ring or tree, and one mesh dimension after the other.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fusedopt.distributed.ranks import Item, Ranks, device_of, meshes_of
from fusedopt.reference import Group, exact_sum

LIMBS = exact_sum.LIMBS
INFS, NANS, FOUND_INF, WIDE, SHARDED, REFUSALS = range(LIMBS, LIMBS + 6)
DIGEST, DIGEST_SQUARED = range(LIMBS + 6, LIMBS + 8)
SIZE = LIMBS + 8

_DIGEST_BITS = 24  # a square summed over 2**15 ranks still fits into an int64


class PeerError(RuntimeError):
    """Another rank refused, is gone, or was asked for something else; nothing was changed here.

    Attributes:
        ranks: the global ranks that refused, or all ranks where they disagree. None, where a rank
            doesn't answer.
    """

    def __init__(self, message: str, ranks: list[int] | None) -> None:
        super().__init__(message)
        self.ranks = ranks

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.ranks)


class RefusalAhead(Exception):
    """Another rank will refuse with its message, and this one has nothing to say in its own."""


class Exchange:
    """One step's message. Every rank sends exactly one: its sums, or that it refuses.

    Args:
        ranks: who steps together; None: this rank alone, for several optimizers that do.
        asked: what this rank was asked for, in words; all ranks must have been asked for the same.

    Attributes:
        sent: whether this rank has sent its message.
        counted: by device, which chunks this rank adds to the sum: bool, shape (chunks,).
        is_wide: whether this rank's result is float64; after the message, whether any rank's is.
        is_sharded: whether this rank has what others lack; after the message, whether any has.
        found_inf: after the message, 1 if any rank asks for a skip, else 0: 0-d float32.
    """

    def __init__(self, ranks: Ranks | None, asked: str) -> None:
        self.sent = False
        self.counted: list[Tensor] = []
        self.is_wide = False
        self.is_sharded = False
        self.found_inf = torch.zeros((), dtype=torch.float32)
        self._ranks = ranks
        self._asked = asked
        self._message = torch.zeros(SIZE, dtype=torch.int64)

    def __call__(self, chunk_sums: list[Tensor]) -> float:
        """The sum of squares over all ranks, from the sums of this rank's chunks, by device.

        Raises:
            PeerError: a rank refused, or the ranks were asked for different steps.
        """
        self.collect(chunk_sums, self.counted)
        return self.total()

    def ask(self, skip: bool, is_sharded: bool) -> None:
        """Whether this rank wants all to skip the step, and has what others may lack."""
        self._message[FOUND_INF] += int(skip)
        self.is_sharded = self.is_sharded or is_sharded

    def collect(self, chunk_sums: list[Tensor], counted: list[Tensor]) -> None:
        """Adds sums of this rank's chunks to its message."""
        message = self._message
        for sums, is_counted in zip(chunk_sums, counted, strict=True):
            sums = sums.detach().cpu()
            message[:LIMBS] += exact_sum.to_limbs(sums[is_counted & sums.isfinite()])
            # Also of what is counted elsewhere: a copy that is broken here makes all ranks skip.
            message[NANS] += sums.isnan().sum()
            message[INFS] += sums.isinf().sum()

    def total(self) -> float:
        """Sends the message; returns the sum of squares over all ranks."""
        message = self._message
        message[WIDE] = int(self.is_wide)
        message[SHARDED] = int(self.is_sharded)
        total = self._send(message)
        if total[REFUSALS]:
            self._raise_refusals(self._gather(None))
        self._check_asked(total)
        self.found_inf.fill_(float(total[FOUND_INF] > 0))
        self.is_wide, self.is_sharded = total[WIDE] > 0, total[SHARDED] > 0
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
        except RefusalAhead:
            self._message.zero_()
            self.total()
            message = "fusedopt: a refusal was announced and not made; please report"
            raise RuntimeError(message) from None
        except Exception as error:
            if not self.sent:
                with suppress(PeerError):  # this rank's own error says more
                    self.refuse(error)
            raise

    def refuse(self, error: Exception) -> None:
        """Joins for a rank that can't step, so that nobody waits for it, and names its error."""
        if self._ranks is None:
            return
        message = torch.zeros(SIZE, dtype=torch.int64)
        message[REFUSALS] = 1
        self._send(message)
        self._gather(f"{type(error).__name__}: {error}")

    def _gather(self, item: Item) -> list[tuple[int, Item]]:
        assert self._ranks is not None
        with _answered():
            return self._ranks.gather(item)

    def _send(self, message: Tensor) -> list[int]:
        self.sent = True
        if self._ranks is None:
            return message.tolist()
        digest = zlib.crc32(self._asked.encode()) & ((1 << _DIGEST_BITS) - 1)
        message[DIGEST], message[DIGEST_SQUARED] = digest, digest * digest
        return add_up(message, self._ranks.groups, self._ranks.device)

    def _raise_refusals(self, errors: Sequence[tuple[int, str | None]]) -> None:
        refused = [(rank, error) for rank, error in errors if error is not None]
        told = "; ".join(f"rank {rank} refused this step: {error}" for rank, error in refused)
        raise PeerError(f"{told}. Nothing has been changed here", [rank for rank, _ in refused])

    def _check_asked(self, total: list[int]) -> None:
        """By Cauchy and Schwarz, the two sums fit together only if all digests are equal."""
        if self._ranks is None or self._ranks.size * total[DIGEST_SQUARED] == total[DIGEST] ** 2:
            return
        asked = self._gather(self._asked)
        told = "; ".join(f"rank {rank} has {it}" for rank, it in asked)
        raise PeerError(
            f"the ranks were asked for different steps: {told}; expected the same on all. Nothing "
            "has been changed",
            [rank for rank, _ in asked],
        )


def add_up(message: Tensor, groups: Iterable[Any], device: torch.device) -> list[int]:
    """The sum of a message over all ranks of some groups, one after the other.

    Raises:
        PeerError: a rank is gone, or doesn't answer in the group's time.
    """
    message = message.to(device)
    with _answered():
        for group in groups:
            dist.all_reduce(message, group=group)
        return message.tolist()


@contextmanager
def _answered() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise PeerError(
            f"a rank is gone, or doesn't answer: {error}. Nothing has been changed here", None
        ) from error


def announce(failed: bool, meshes: Iterable[Any]) -> None:
    """Comes before gradients are redistributed, which communicates: has a rank failed already?

    Raises:
        RefusalAhead: another rank of these meshes has failed. This rank has not.
    """
    for mesh in meshes:
        groups = mesh.get_all_groups()
        total = add_up(torch.tensor([int(failed)]), groups, device_of(groups[0]))
        if total[0] and not failed:
            raise RefusalAhead


def find_ranks(
    param_groups: list[Group], process_group: Any, plain: str, asked: str
) -> Ranks | None:
    """As `Ranks.of`. If that refuses, the ranks of each mesh hear of it and don't wait."""
    try:
        return Ranks.of(param_groups, process_group, plain)
    except Exception as error:
        for mesh in meshes_of(param_groups):
            with suppress(PeerError):
                Exchange(Ranks(mesh, plain), asked).refuse(error)
        raise
