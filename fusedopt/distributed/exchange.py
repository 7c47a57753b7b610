"""The message of a step: one SUM all-reduce of integers, after which all ranks know the same.

`reference.message` says what is in it. It is written, added up and read where the gradients are.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fusedopt.distributed.ranks import Item, Ranks, device_of, meshes_of
from fusedopt.reference import Group, message

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

    Without a host that waits, the device decides by the total, and `settle` tells the host later.

    Args:
        ranks: who steps together; None: this rank alone, for several optimizers that do.
        asked: what this rank was asked for, in words; all ranks must have been asked for the same.
        waits: whether the host waits for the total, if it lies on a GPU.

    Attributes:
        sent: whether this rank has sent its message.
        counted: by device, which chunks this rank adds to the sum: bool, shape (chunks,).
        is_wide: whether this rank's result is float64; after `settle`, whether any rank's is.
        is_sharded: whether this rank has what others lack; after `settle`, whether any has.
        is_settled: whether the host has read the total.
    """

    def __init__(self, ranks: Ranks | None, asked: str, waits: bool = True) -> None:
        self.sent = False
        self.counted: list[Tensor] = []
        self.is_wide = False
        self.is_sharded = False
        self.is_settled = False
        self._ranks = ranks
        self._asked = asked
        self._waits = waits or ranks is None or ranks.on_host
        self._messages: list[Tensor] = []
        self._wishes: list[Tensor] = []
        self._total: Tensor | None = None
        self._copy: HostCopy | None = None

    def __call__(self, messages: list[Tensor]) -> Tensor:
        """The total of all ranks' messages; see `reference.message`.

        Args:
            messages: of this rank, by device: int64, shape (SIZE,).

        Raises:
            PeerError: a rank refused, or the ranks were asked for different steps.
        """
        self.collect(messages)
        return self.total()

    def ask(self, found_inf: Tensor | None, is_sharded: bool) -> None:
        """Whether this rank wants all to skip the step, and has what others may lack.

        Raises:
            RuntimeError: `found_inf` is not a single number.
        """
        if found_inf is not None and found_inf.numel() != 1:
            raise RuntimeError(f"found_inf has {found_inf.numel()} elements; expected one number")
        if found_inf is not None:
            self._wishes.append(found_inf)
        self.is_sharded = self.is_sharded or is_sharded

    def collect(self, messages: list[Tensor]) -> None:
        """Adds to this rank's message."""
        self._messages += messages

    @property
    def found_inf(self) -> Tensor:
        """After the message, 1 if a rank asks for a skip, else 0: 0-d float32."""
        assert self._total is not None
        return message.asks_for_skip(self._total)

    def total(self) -> Tensor:
        """Sends the message; returns the total of all ranks: int64, shape (SIZE,)."""
        counts = {message.WIDE: int(self.is_wide), message.SHARDED: int(self.is_sharded)}
        counts |= self._digest()
        own = self._counts(counts)
        for its in self._messages:
            own += its.to(own.device)
        for wish in self._wishes:
            own[message.FOUND_INF] += wish.to(own.device).ne(0).sum()
        self._total = self._send(own)
        self._copy = HostCopy(self._total)
        if self._waits:
            self.settle()
        return self._total

    def settle(self) -> None:
        """Reads the total on the host, once.

        Raises:
            PeerError: a rank refused, or the ranks were asked for different steps.
        """
        if self.is_settled or self._copy is None:
            return
        self.is_settled = True
        total = self.read()
        if total[message.REFUSALS]:
            self._raise_refusals(total)
        if not message.is_agreed(total):
            self._raise_differences()
        self.is_wide, self.is_sharded = total[message.WIDE] > 0, total[message.SHARDED] > 0

    def read(self) -> list[int]:
        """The total, on the host."""
        assert self._copy is not None
        with _answered():
            return self._copy.read()

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Makes sure that this rank sends its message: one that fails before it refuses."""
        try:
            yield
        except PeerError:
            raise
        except RefusalAhead:
            self._messages, self._waits = [], True
            self.total()
            told = "fusedopt: a refusal was announced and not made; please report"
            raise RuntimeError(told) from None
        except Exception as error:
            if not self.sent:
                with suppress(PeerError):  # this rank's own error says more
                    self.refuse(error)
            raise

    def refuse(self, error: Exception) -> None:
        """Joins for a rank that can't step, so that nobody waits for it, and names its error."""
        if self._ranks is None:
            return
        self._send(self._counts({message.REFUSALS: 1, message.REFUSING: dist.get_rank()}))
        if self._ranks.on_host:
            self._gather(f"{type(error).__name__}: {error}")

    def _digest(self) -> dict[int, int]:
        if self._ranks is None:
            return {}
        digest = zlib.crc32(self._asked.encode()) & ((1 << _DIGEST_BITS) - 1)
        return {message.DIGEST: digest, message.DIGEST_SQUARED: digest * digest}

    def _counts(self, counts: dict[int, int]) -> Tensor:
        """A message of counts alone, where the total is to be."""
        found = [0] * message.SIZE
        for slot, count in {**counts, message.RANKS: 1}.items():
            found[slot] = count
        first = self._messages[0].device if self._messages else torch.device("cpu")
        device = first if self._ranks is None else self._ranks.device
        return torch.tensor(found).to(device, non_blocking=True)  # else the host would wait

    def _gather(self, item: Item) -> list[tuple[int, Item]]:
        assert self._ranks is not None
        with _answered():
            return self._ranks.gather(item)

    def _send(self, own: Tensor) -> Tensor:
        """Returns the total."""
        self.sent = True
        if self._ranks is not None:
            reduce(own, self._ranks.groups)
        return own

    def _raise_refusals(self, total: list[int]) -> None:
        refused: list[tuple[int, str]] = []
        assert self._ranks is not None
        if self._ranks.on_host:
            gathered: list[tuple[int, str | None]] = self._gather(None)
            refused = [(rank, f": {error}") for rank, error in gathered if error is not None]
        elif total[message.REFUSALS] == 1:
            refused = [(total[message.REFUSING], " and raises why")]
        step = "this step" if self._waits else "the step before this one"
        told = "; ".join(f"rank {rank} refused {step}{error}" for rank, error in refused)
        told = told or f"{total[message.REFUSALS]} ranks refused {step} and raise why"
        changed = "Nothing has been" if self._waits else "By that step, nothing has been"
        raise PeerError(f"{told}. {changed} changed here", [rank for rank, _ in refused] or None)

    def _raise_differences(self) -> None:
        assert self._ranks is not None
        asked: list[tuple[int, str]] = [(dist.get_rank(), self._asked)]
        if self._ranks.on_host:
            asked = self._gather(self._asked)
        told = "; ".join(f"rank {rank} has {it}" for rank, it in asked)
        others = "" if self._ranks.on_host else "; other ranks have something else"
        raise PeerError(
            f"the ranks were asked for different steps: {told}{others}; expected the same on all. "
            "Nothing has been changed",
            [rank for rank, _ in asked] if self._ranks.on_host else None,
        )


class HostCopy:
    """A copy of a message that is on its way to the host."""

    def __init__(self, total: Tensor) -> None:
        self._copy = total.to("cpu", non_blocking=True)
        self._event: Any = None
        if total.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(total.device))

    def read(self) -> list[int]:
        """Waits for it."""
        if self._event is not None:
            self._event.synchronize()
        return self._copy.tolist()


def reduce(own: Tensor, groups: Iterable[Any]) -> None:
    """Adds up a message over all ranks of some groups, one after the other, in place.

    Raises:
        PeerError: a rank is gone, or doesn't answer in the group's time.
    """
    with _answered():
        for group in groups:
            dist.all_reduce(own, group=group)


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
        failures = torch.tensor([int(failed)]).to(device_of(groups[0]))
        reduce(failures, groups)
        if failures.item() and not failed:
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
