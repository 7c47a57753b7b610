"""Compares gradients between ranks that should hold the same, and names the ranks that differ."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedopt.core import checks
from fusedopt.distributed import Ranks, is_dtensor, is_placed_as, local_of, replica_of
from fusedopt.reference import Group
from fusedopt.reference.groups import named_params

Checksums = dict[tuple[Any, ...], int | None]  # by replica; None: there is no gradient

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
_NAMED = 3  # so many parameters are named, and the others counted


class ReplicasDifferError(RuntimeError):
    """Ranks that are to hold the same gradients hold others; nothing has been changed.

    Attributes:
        names: the parameters whose gradients differ.
        ranks: the global ranks whose gradients are not those of the first rank that has a copy.
    """

    def __init__(self, names: list[str], ranks: list[int]) -> None:
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        super().__init__(
            f"the gradients of {', '.join(names[:_NAMED])}{more} are other ones on "
            f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))} than on the "
            "first rank with a copy; expected the same on all (check_replicas). Is a no_sync "
            "forgotten, or a parameter not reduced? Nothing has been changed"
        )
        self.names = names
        self.ranks = ranks

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.names, self.ranks)


def check_replicas(param_groups: list[Group], ranks: Ranks, plain: str) -> None:
    """Compares checksums of the bits of all gradients. Every rank of `ranks` calls it.

    Raises:
        ReplicasDifferError: on all ranks alike.
    """
    first: Checksums = {}
    names: dict[str, None] = {}
    found: set[int] = set()
    for rank, checksums in ranks.gather(_checksums(param_groups, plain)):
        for replica, checksum in checksums.items():
            if first.setdefault(replica, checksum) != checksum:
                names[str(replica[0])] = None
                found.add(rank)
    if names:
        raise ReplicasDifferError(list(names), sorted(found))


def _checksums(param_groups: list[Group], plain: str) -> Checksums:
    """Of this rank's copies. Gradients that are yet to be added up (`Partial`) are none."""
    pairs = list(named_params(param_groups))
    checksums: Checksums = {}
    measured: list[tuple[tuple[Any, ...], Tensor]] = []
    for param, name in pairs:
        replica, grad = replica_of(param, plain), param.grad
        if replica is None:
            continue
        key = (name, len(pairs), tuple(param.shape), *replica)
        if grad is None:
            checksums[key] = None
        elif _is_whole(param, grad):
            measured.append((key, _sum_of_bits(local_of(grad))))
    for (key, _), value in zip(measured, _to_host([it for _, it in measured]), strict=True):
        checksums[key] = value
    return checksums


def _is_whole(param: Any, grad: Any) -> bool:
    """Whether it is a gradient that can be compared. What can't be read, the step refuses."""
    if is_dtensor(grad) and not (is_dtensor(param) and is_placed_as(param, grad)):
        return False
    try:
        checks.check_readable(local_of(grad), "a gradient")
    except (TypeError, RuntimeError):
        return False
    return not grad.is_meta


def _sum_of_bits(grad: Tensor) -> Tensor:
    """The sum of the elements' bits as integers: 0-d int64. Any single change changes it."""
    whole_numbers = grad.detach().contiguous().view(_INTEGERS[grad.element_size()])
    return whole_numbers.sum(dtype=torch.int64)


def _to_host(values: list[Tensor]) -> list[int]:
    """All of them by one copy from each device."""
    found: dict[torch.device, list[Tensor]] = {}
    for value in values:
        found.setdefault(value.device, []).append(value)
    on_host = {device: iter(torch.stack(its).tolist()) for device, its in found.items()}
    return [next(on_host[value.device]) for value in values]
