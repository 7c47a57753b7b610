"""The orthogonalization of matrices by Newton and Schulz's iteration, in bfloat16 as torch's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedopt.reference import Group

# Matrices of equal shape are multiplied together, up to so many elements at once. Larger ones fill
# a device by themselves, and the copies would take much memory.
BATCH_ELEMENTS = 1 << 24
OPTIONS = {"ns_coefficients", "ns_steps", "eps", "adjust_lr_fn"}  # of a param group
LARGEST = torch.finfo(torch.bfloat16).max
ADJUSTMENTS = (None, "original", "match_rms_adamw")


class Iteration(NamedTuple):
    """The options of a param group that tell how its directions are orthogonalized."""

    coefficients: tuple[float, float, float]
    steps: int
    eps: float
    adjust_lr_fn: str | None

    @classmethod
    def of(cls, group: Group, name: str) -> Iteration:
        """Refuses what torch's Muon refuses, by name. `name`: "param group 0's ", say."""
        steps, adjust = group["ns_steps"], group["adjust_lr_fn"]
        if type(steps) is not int or not 0 <= steps < 100:
            raise ValueError(
                f"Invalid {name}ns_steps value: {steps!r}; expected an int from 0 to 99"
            )
        if adjust not in ADJUSTMENTS:
            expected = ", ".join(map(repr, ADJUSTMENTS))
            raise ValueError(
                f"Invalid {name}adjust_lr_fn value: {adjust!r}; expected one of {expected}"
            )
        try:
            a, b, c = map(_as_bfloat16_takes, group["ns_coefficients"])
            return cls((a, b, c), steps, _as_bfloat16_takes(group["eps"]), adjust)
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(
                f"Invalid {name}ns_coefficients or eps value: {group['ns_coefficients']!r}, "
                f"{group['eps']!r}; expected three numbers, and one, no larger than {LARGEST:.3g}"
            ) from error

    def lr_ratio(self, shape: torch.Size) -> float:
        """The number that the learning rate is multiplied by for a matrix of this shape."""
        rows, columns = shape
        if self.adjust_lr_fn == "match_rms_adamw":
            return 0.2 * math.sqrt(max(rows, columns))
        return math.sqrt(max(1, rows / columns)) if columns > 0 else 1.0


def _as_bfloat16_takes(value: Any) -> float:
    number = float(value)
    if LARGEST < abs(number) < math.inf:  # torch's functions refuse it, but not infinity
        raise OverflowError
    return number


def orthogonalized(matrices: Tensor, iteration: Iteration) -> Tensor:
    """Matrices whose singular values are all near 1: bfloat16, shape (count, rows, columns)."""
    found = matrices.to(torch.bfloat16)
    is_tall = found.shape[1] > found.shape[2]
    if is_tall:
        found = found.mT
    norms = torch.linalg.vector_norm(found, dim=(1, 2), keepdim=True)
    found = found / norms.clamp(min=iteration.eps)
    a, b, c = iteration.coefficients
    for _ in range(iteration.steps):
        gram = torch.bmm(found, found.mT)
        update = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        found = torch.baddbmm(found, update, found, beta=a)
    return found.mT if is_tall else found


def updates_of(
    directions: list[tuple[Iteration, Tensor, Tensor]],
) -> Iterator[tuple[Tensor, Tensor]]:
    """For every parameter, what is subtracted from it times the learning rate.

    It has the shape and the dtype of the parameter.

    Args:
        directions: how to orthogonalize, a parameter, and its direction.
    """
    alike: dict[Any, list[tuple[Tensor, Tensor]]] = {}
    for iteration, param, direction in directions:
        if param.numel() > 0:
            key = iteration, param.shape, param.dtype, direction.dtype, param.device
            alike.setdefault(key, []).append((param, direction))
    for (iteration, shape, dtype, *_), its in alike.items():
        at_once = max(1, BATCH_ELEMENTS // shape.numel())
        ratio = iteration.lr_ratio(shape)
        for first in range(0, len(its), at_once):
            batch = its[first : first + at_once]
            matrices = torch.stack([direction for _, direction in batch])
            updates = orthogonalized(matrices, iteration).to(dtype).contiguous()
            if ratio != 1:
                updates = updates * ratio
            for (param, _), update in zip(batch, updates.unbind(), strict=True):
                yield param, update
