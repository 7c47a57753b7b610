"""Exact sums of float64 numbers: integers that can be added in any order, rounded once at the end.

A finite float64 is a multiple of 2**-1074. The sum of many is an integer of that unit. It is kept
in `LIMBS` limbs of 32 bits, the lowest first, each in an int64: limb i counts 2**(32 * i) units.
A number adds less than 2**33 to a limb, so that 2**30 numbers can be added before a limb overflows.
Integers add up to the same bits in any order: devices, ranks and tensors may come as they like.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LIMBS = 70
LIMB_BITS = 32
UNIT_EXPONENT = -1074  # the lowest bit of a float64

_LIMB = (1 << LIMB_BITS) - 1
_FRACTION_BITS = 52


def to_limbs(terms: Tensor) -> Tensor:
    """The exact sum of finite float64 numbers of any sign: int64, shape (LIMBS,)."""
    bits = terms.detach().reshape(-1).contiguous().view(torch.int64)
    exponent = (bits >> _FRACTION_BITS) & 0x7FF
    implied = (exponent > 0).to(torch.int64) << _FRACTION_BITS
    mantissa = (bits & ((1 << _FRACTION_BITS) - 1)) | implied
    shift = exponent.clamp_min(1) - 1
    first, offset = shift >> 5, shift & (LIMB_BITS - 1)
    low = (mantissa & _LIMB) << offset
    high = (mantissa >> LIMB_BITS) << offset
    parts = torch.stack([low & _LIMB, (low >> LIMB_BITS) + (high & _LIMB), high >> LIMB_BITS])
    parts = torch.where(bits < 0, -parts, parts)
    places = torch.stack([first, first + 1, first + 2])
    limbs = torch.zeros(LIMBS, dtype=torch.int64, device=terms.device)
    return limbs.index_add_(0, places.reshape(-1), parts.reshape(-1))


def from_limbs(limbs: Sequence[int]) -> float:
    """The sum that limbs stand for, rounded once to the nearest float64, as `math.fsum` rounds.

    A sum beyond the largest float64 is inf, where `math.fsum` raises.
    """
    units = sum(limb << (LIMB_BITS * index) for index, limb in enumerate(limbs))
    try:
        return units / (1 << -UNIT_EXPONENT)
    except OverflowError:
        return float("inf") if units > 0 else float("-inf")


def exact_sum(terms: Tensor) -> float:
    """The sum of float64 numbers, rounded once; inf or nan, in any order, as they add up to."""
    if not bool(terms.isfinite().all()):
        return terms.sum().item()
    return from_limbs(to_limbs(terms).tolist())
