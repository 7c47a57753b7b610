"""Whole parameters dealt over the ranks of a group: who updates which, and how all get the rest."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fusedopt.distributed.exchange import PeerError
from fusedopt.distributed.ranks import Ranks

BUCKET_BYTES = 25 * 2**20
_IN_FLIGHT = 4  # so many buckets are on their way at once


class _Transfer(NamedTuple):
    """A bucket on its way."""

    work: Any
    owner: int
    bucket: list[Tensor]
    flat: Tensor


class Share:
    """The parameters that this rank updates, out of a list that all ranks of a group have alike.

    Attributes:
        ranks: the ranks of the group; each counts the gradients of its share.
        rank, size: this rank's place in the group, and how many ranks there are.
        owners: for every parameter, the place in the group of the rank that updates it.
    """

    def __init__(self, params: list[Tensor], group: Any) -> None:
        self.ranks = Ranks(group, "own")
        self.rank, self.size = dist.get_rank(group), self.ranks.size
        self.owners = dict(zip(params, deal([_bytes_of(it) for it in params], self.size)))
        # A parameter of another rank is an empty tensor to the kernels. It never has a gradient.
        self._absent = {it: it.new_empty(0) for it in params if self.owners[it] != self.rank}
        self._group = group

    def keeps(self, param: Tensor) -> bool:
        """Whether this rank has the parameter's state."""
        return param not in self._absent

    def part_of(self, param: Tensor) -> Tensor:
        """What this rank's kernels see: the parameter, or an empty tensor in its place."""
        return self._absent.get(param, param)

    def gather(self, params: Iterable[Tensor]) -> None:
        """Gives every rank the parameters that the others have updated, by broadcasts of buckets.

        Args:
            params: the same ones on all ranks, in the same order.

        Raises:
            PeerError: a rank is gone, or doesn't answer in the group's time. Then some of the
                parameters here are from before the step, and some from after it.
        """
        in_flight: deque[_Transfer] = deque()
        with _answered():
            for owner, bucket in self._buckets(params):
                in_flight.append(self._send(owner, bucket))
                if len(in_flight) == _IN_FLIGHT:
                    self._receive(in_flight.popleft())
            while in_flight:
                self._receive(in_flight.popleft())

    def least(self, values: list[Tensor]) -> list[Tensor]:
        """Of each number in some float64 tensors of one device the smallest on all ranks.

        Raises:
            PeerError: a rank is gone, or doesn't answer in the group's time.
        """
        message = torch.cat([it.reshape(-1) for it in values]).to(self.ranks.device)
        with _answered():
            dist.all_reduce(message, dist.ReduceOp.MIN, group=self._group)
        parts = message.to(values[0].device).split([it.numel() for it in values])
        return [part.view(it.shape) for part, it in zip(parts, values, strict=True)]

    def collect(self, item: Any, to: int) -> list[Any] | None:
        """On the rank `to` of the group, the items of all ranks in order; None on the others."""
        found: list[Any] | None = [None] * self.size if self.rank == to else None
        dist.gather_object(item, found, dist.get_global_rank(self._group, to), self._group)
        return found

    def _send(self, owner: int, bucket: list[Tensor]) -> _Transfer:
        flat = _flat(bucket).to(self.ranks.device)
        source = dist.get_global_rank(self._group, owner)
        options = {"group": self._group, "async_op": True}
        work = dist.broadcast(flat.view(torch.uint8), source, **options)
        return _Transfer(work, owner, bucket, flat)

    def _receive(self, transfer: _Transfer) -> None:
        work, owner, bucket, flat = transfer
        work.wait()
        if owner == self.rank:
            return
        torch.autograd.graph.increment_version(bucket)
        if len(bucket) == 1 and flat.data_ptr() == bucket[0].data_ptr():
            return  # it was received in place
        parts = flat.split([it.numel() for it in bucket])
        values = [part.view(it.shape) for part, it in zip(parts, bucket, strict=True)]
        into = [it.detach() for it in bucket]
        torch._foreach_copy_(into, values)  # pyright: ignore[reportPrivateImportUsage]

    def _buckets(self, params: Iterable[Tensor]) -> Iterator[tuple[int, list[Tensor]]]:
        """Each with its owner: parameters of one dtype and device, of `BUCKET_BYTES` or one."""
        filling: dict[tuple[int, torch.dtype, torch.device], tuple[int, list[Tensor]]] = {}
        for param in params:
            if param.numel() == 0:
                continue
            key = self.owners[param], param.dtype, param.device
            size, bucket = filling.get(key, (0, []))
            if bucket and size + _bytes_of(param) > BUCKET_BYTES:
                yield key[0], bucket
                size, bucket = 0, []
            filling[key] = size + _bytes_of(param), [*bucket, param]
        for key, (_, bucket) in filling.items():
            yield key[0], bucket

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError(
            "an optimizer whose states are sharded can't be copied or pickled: it belongs to a "
            "process group; expected its state_dict(), or a copy from before shard_states()"
        )


@contextmanager
def _answered() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise PeerError(
            f"a rank is gone, or doesn't answer: {error}. It was lost while the ranks gathered "
            "updated parameters: some of the parameters here are from before the step, and some "
            "from after it; start all ranks again from a checkpoint",
            None,
        ) from error


def deal(sizes: list[int], ranks: int) -> list[int]:
    """The rank of each parameter. The largest goes first, always to the rank that has least."""
    loads = [(0, rank) for rank in range(ranks)]  # a heap
    owners = [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda it: -sizes[it]):
        load, owners[index] = loads[0]
        heapq.heapreplace(loads, (load + sizes[index], owners[index]))
    return owners


def _bytes_of(param: Tensor) -> int:
    return param.numel() * param.element_size()


def _flat(bucket: list[Tensor]) -> Tensor:
    """All elements one after the other; the memory of a single dense parameter itself."""
    if len(bucket) == 1:
        return bucket[0].detach().reshape(-1)
    return torch.cat([it.detach().reshape(-1) for it in bucket])
