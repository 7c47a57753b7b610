"""Norms in plain torch, summed as every compiled backend sums them.

The order of a sum is a part of the specification: the norm has the same bits for any number of
threads or blocks.

1. A gradient, in its parameter's memory order, is cut into chunks of `CHUNK_SIZE` elements.
2. The squares of a chunk's elements are summed in `ROW_BYTES // itemsize` lanes: element i is added
   to lane i % lanes. Lanes are float32 (float64 for float64 gradients). The square and the addition
   are rounded, each by itself.
3. Lanes are folded in float64: neighboring lanes are added, then neighboring results, until one is
   left.
4. If this sum is not finite or is below `SMALLEST_SUM`, the chunk is measured again with float64
   lanes. Squares of finite float32 numbers don't overflow in float64, and none of them is lost.
5. The sums of all chunks, of all devices, are added exactly, and rounded once. A parameter without
   a gradient counts as zeros. So does a parameter of a group that is not clipped, except for its
   chunks that are not finite.

Telemetry and limits of tensors need a parameter's own norm: the sums of its chunks are added
exactly, and rounded once.

A limit of rows needs a row's norm. A row is cut into parts where chunks end, and a part into runs
of `RUN_SIZE` elements. The squares of a run are summed in `TENSOR_LANES` lanes: element i of the
part is added to lane i % lanes. These lanes are float32 (float64 for float64 values). The lanes of
the runs are added in float64, and folded as in 3. If this sum is not finite or is below
`SMALLEST_SUM`, the squares of the part are summed again in float64 in `TENSOR_LANES` lanes. The
sums of a row's parts are added exactly, and rounded once.

Telemetry sums the squares of parameters and of their updates in a chunk's lanes in float32 (float64
for float64 parameters). The upper half of the lanes is added to the lower half until `TENSOR_LANES`
lanes are left; these are folded in float64. A trust ratio sums squares of parameters and of terms
in the same lanes, but in float64, and adds the sums of chunks exactly.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from fusedopt.reference.arithmetic import cast_grad, compute_dtype, sqrt
from fusedopt.reference.exact_sum import exact_sum

CHUNK_SIZE = 16384
ROW_BYTES = 4096
TENSOR_LANES = 32
RUN_SIZE = 512
SMALLEST_SUM = 2.0**-80


def in_memory_order(tensor: Tensor, param: Tensor) -> Tensor:
    """The elements of `tensor` (shaped as `param`), in the memory order of `param`: 1-d."""
    strides = torch.empty_like(param, device="meta").stride()
    order = sorted(range(param.dim()), key=lambda dim: -strides[dim])
    return tensor.permute(order).reshape(-1)


def fold(lanes: Tensor) -> Tensor:
    """The sum over the last dimension, whose size is a power of two. Neighbors are added first."""
    while lanes.shape[-1] > 1:
        lanes = lanes[..., 0::2] + lanes[..., 1::2]
    return lanes[..., 0]


def in_lanes(terms: Tensor, lanes: int) -> Tensor:
    """Sums the last dimension in `lanes` lanes: term i is added to lane i % lanes."""
    rows = max(1, -(-terms.shape[-1] // lanes))
    terms = torch.nn.functional.pad(terms, (0, rows * lanes - terms.shape[-1]))
    return sum_of_rows(terms.unflatten(-1, (rows, lanes)))


def sum_of_rows(rows: Tensor) -> Tensor:
    """The sum over the last dimension but one, in order."""
    total = torch.zeros_like(rows[..., 0, :])
    for row in rows.unbind(-2):
        total = total + row
    return total


def is_out_of_range(sums: Tensor) -> Tensor:
    """Where float32 squares may have overflowed, or vanished: bool, shaped as `sums`."""
    return ~(sums.isfinite() & (sums >= SMALLEST_SUM))


def sum_in_lanes(terms: Tensor, lanes: int) -> Tensor:
    """The sum over the last dimension of a float64 tensor: first in lanes, then over the lanes."""
    return fold(in_lanes(terms, lanes))


def chunk_sums(param: Tensor, grad: Tensor | None) -> Tensor:
    """The sum of squares of every chunk of a parameter's gradient, float64, shape (chunks,)."""
    chunks = -(-param.numel() // CHUNK_SIZE)
    if grad is None or chunks == 0:
        return torch.zeros(chunks, dtype=torch.float64, device=param.device)
    return sums_of_squares(cast_grad(grad, param), param)


def sums_of_squares(values: Tensor, param: Tensor) -> Tensor:
    """As `chunk_sums`, for any values shaped as the parameter."""
    values = in_memory_order(values, param)
    values = values.to(compute_dtype(values.dtype))
    chunks = max(1, -(-values.numel() // CHUNK_SIZE))
    if chunks > 1:
        values = torch.nn.functional.pad(values, (0, chunks * CHUNK_SIZE - values.numel()))
    values = values.view(chunks, -1)
    lanes = ROW_BYTES // param.element_size()
    sums = fold(in_lanes(values * values, lanes).to(torch.float64))
    again = is_out_of_range(sums)
    if again.any():
        squares = values[again].to(torch.float64).square()
        sums[again] = sum_in_lanes(squares, lanes)
    return sums


def sums_in_single(values: Tensor, param: Tensor) -> Tensor:
    """As `sums_of_squares`, but lanes are summed in the dtype of `values`."""
    values = in_memory_order(values, param)
    values = torch.nn.functional.pad(values, (0, -values.numel() % CHUNK_SIZE))
    lanes = ROW_BYTES // param.element_size()
    squares = (values * values).view(-1, CHUNK_SIZE)
    total = in_lanes(squares, lanes)
    while total.shape[-1] > TENSOR_LANES:
        first, second = total.chunk(2, dim=-1)
        total = first + second
    return fold(total.to(torch.float64))


def grad_norm(grad: Tensor, param: Tensor) -> Tensor:
    """The norm of a parameter's gradient: 0-d float64."""
    total = exact_sum(sums_of_squares(grad, param))
    return sqrt(torch.tensor(total, dtype=torch.float64, device=param.device))


def tensor_norm(values: Tensor, param: Tensor) -> float:
    """The norm of values shaped as the parameter, for a trust ratio."""
    return math.sqrt(exact_sum(sums_in_single(values.to(torch.float64), param)))


def norm_of_chunks(sums: Tensor) -> Tensor:
    """The norm of a parameter's values, from the sums of its chunks: 0-d float64."""
    return sqrt(sum_in_lanes(sums, TENSOR_LANES))


def sums_of_parts(parts: Tensor) -> Tensor:
    """The sums of squares over the last dimension of parts of rows: float64, shape (parts,)."""
    runs = torch.nn.functional.pad(parts, (0, -parts.shape[-1] % RUN_SIZE))
    lanes = in_lanes((runs * runs).unflatten(-1, (-1, RUN_SIZE)), TENSOR_LANES)
    sums = fold(sum_of_rows(lanes.to(torch.float64)))
    again = is_out_of_range(sums)
    if again.any():
        sums[again] = sum_in_lanes(parts[again].to(torch.float64).square(), TENSOR_LANES)
    return sums


def unit_norms(values: Tensor, param: Tensor) -> Tensor:
    """The norm of every row of values shaped as the parameter: float64, shape (rows,).

    A parameter with fewer than two dimensions is a single row.
    """
    units = param.shape[0] if param.dim() > 1 else 1
    if param.numel() == 0:
        return torch.zeros(units, dtype=torch.float64, device=param.device)
    values = in_memory_order(values, param)
    values = values.to(compute_dtype(values.dtype))
    size = param.numel() // units
    totals = sums_of_parts(values.view(units, size))
    cuts = range(CHUNK_SIZE, param.numel(), CHUNK_SIZE)
    for unit in {cut // size for cut in cuts if cut % size != 0}:
        first, last = unit * size, (unit + 1) * size
        ends = [first, *(cut for cut in cuts if first < cut < last), last]
        parts = [sums_of_parts(values[None, i:j]) for i, j in itertools.pairwise(ends)]
        totals[unit] = exact_sum(torch.cat(parts))
    return sqrt(totals)


def sum_of_squares(pairs: Iterable[tuple[Tensor, Tensor | None]]) -> float:
    """The sum of squares over all pairs (parameter, gradient), in the specified order."""
    sums = [it.cpu() for it in chunk_sums_by_device(pairs)]
    return exact_sum(torch.cat(sums)) if sums else 0.0


def counted_sums(sums: Tensor, is_clipped: bool) -> Tensor:
    """What a parameter's chunks add to the norm that clips; of one that isn't, inf and nan."""
    return sums if is_clipped else sums[~sums.isfinite()]


def chunk_sums_by_device(pairs: Iterable[tuple[Tensor, Tensor | None]]) -> list[Tensor]:
    """The sums of all chunks of every device, in the order of the parameters."""
    sums: dict[torch.device, list[Tensor]] = {}
    for param, grad in pairs:
        sums.setdefault(param.device, []).append(chunk_sums(param, grad))
    return [torch.cat(it) for it in sums.values()]
