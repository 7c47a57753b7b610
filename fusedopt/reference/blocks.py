"""States of 8 bits: `state_dtype="8bit"`.

Each block of `BLOCK_SIZE` elements that are neighbors in memory has a scale, a float32: the
difference between neighboring codes. A state `name` is stored as `name_8bit`, shaped and laid out
as the parameter, and `name_scale`, of shape (number of blocks,).

* "linear", int8: with a the largest magnitude in the block, but at least 2^-96, the scale is
  a / 127, and an element's code is the element times 127 / a, rounded to nearest, ties to even.
* "root", uint8: for a state that is never negative, by its root s. The scale is a / 255. The code
  is s times 255 / a, rounded to a multiple of 2^-15, plus 15 random bits, and cut off; but between
  1 and 255, and 0 only if s is 0. Without random bits, it is rounded to nearest.

If an element of a block is not finite, the scale is nan, and the codes are 0.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fusedopt.reference.arithmetic import sqrt

Coding = Literal["linear", "root"]

BLOCK_SIZE = 64
SMALLEST_MAGNITUDE = 2.0**-96
CODES = {"linear": 127, "root": 255}  # the largest code
CODE_DTYPES = {"linear": torch.int8, "root": torch.uint8}
CODES_SUFFIX, SCALES_SUFFIX = "_8bit", "_scale"
RANDOM_MASK = 0x7FFF
NEAREST = 0x4000  # in place of 15 random bits


def keys_of(name: str) -> tuple[str, str]:
    """The names of a state's codes and scales."""
    return name + CODES_SUFFIX, name + SCALES_SUFFIX


def num_blocks(numel: int) -> int:
    return -(-numel // BLOCK_SIZE)


def in_memory_order(tensor: Tensor) -> Tensor:
    """The elements of a tensor as one dimension; a view, if the tensor has no gaps."""
    dense = torch.empty_like(tensor, device="meta", memory_format=torch.preserve_format)
    if tensor.stride() != dense.stride() or tensor.is_neg():
        tensor = tensor.clone(memory_format=torch.preserve_format)
    return tensor.as_strided((tensor.numel(),), (1,))


def decode(coding: Coding, codes: Tensor, scales: Tensor) -> Tensor:
    """float32 values, laid out as the codes."""
    values = torch.empty_like(codes, dtype=torch.float32, memory_format=torch.preserve_format)
    flat = in_memory_order(codes).to(torch.float32)
    flat *= scales.repeat_interleave(BLOCK_SIZE)[: flat.numel()]
    in_memory_order(values).copy_(flat if coding == "linear" else flat * flat)
    return values


def encode(coding: Coding, values: Tensor, random: Tensor | int = NEAREST) -> tuple[Tensor, Tensor]:
    """Codes, laid out as the values, and scales, of float32 values.

    `random`: 15 random bits for every element, laid out as the values, or NEAREST.
    """
    codes = torch.empty_like(values, dtype=CODE_DTYPES[coding], memory_format=torch.preserve_format)
    flat = in_memory_order(values)
    flat = sqrt(flat) if coding == "root" else flat
    blocks = num_blocks(flat.numel())
    padding = flat.new_zeros(blocks * BLOCK_SIZE - flat.numel())
    magnitudes = torch.cat([flat, padding]).abs().view(blocks, BLOCK_SIZE)
    largest = magnitudes.amax(1) if blocks > 0 else flat.new_zeros(0)
    finite = largest.isfinite()
    largest = torch.where(finite, largest, 0).clamp_(min=SMALLEST_MAGNITUDE)
    steps = torch.full_like(largest, CODES[coding])  # tensors: torch divides by them exactly
    scales = (largest / steps).masked_fill_(~finite, torch.nan)
    every = torch.stack([steps / largest, finite.to(torch.float32)])
    per_unit, is_finite = every.repeat_interleave(BLOCK_SIZE, 1)[:, : flat.numel()]
    scaled = torch.where(is_finite > 0, flat, 0) * per_unit
    if coding == "linear":
        in_memory_order(codes).copy_(scaled.round())
        return codes, scales
    fixed = ((scaled + 256).double() - 256) * 2.0**15
    bits = in_memory_order(random) if isinstance(random, Tensor) else random
    found = (fixed.to(torch.int64) + bits >> 15).clamp_(1, 255)
    in_memory_order(codes).copy_(found.masked_fill_((flat == 0) | (is_finite == 0), 0))
    return codes, scales
