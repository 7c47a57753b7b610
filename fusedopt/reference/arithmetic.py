"""Arithmetic that gives the same bits in Python, C++ and CUDA, and the types that it uses."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def power(base: float, exponent: int) -> float:
    """`base ** exponent` by repeated squaring: the same bits in Python, C++ and CUDA."""
    if exponent < 0:
        raise ValueError(f"a number of steps is {exponent}; expected a whole number >= 0")
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


def real_power(base: float, exponent: float) -> float:
    """`base ** exponent` by multiplications and square roots alone; see csrc/math/power.h."""
    size = abs(exponent)
    if not size < 9e18 or not base >= 0:
        return math.nan
    whole = int(size)
    result, rest = power(base, whole), size - whole
    while rest > 0:
        base = math.sqrt(base)
        rest *= 2
        if rest >= 1:
            result *= base
            rest -= 1
    return 1 / result if exponent < 0 else result


def exponential(exponent: float) -> float:
    """`e ** exponent` for an exponent <= 0, with the same bits in Python, C++ and CUDA."""
    if not exponent > -700:
        return 0.0
    part, result = exponent / 256, 1.0
    for k in range(14, 0, -1):
        result = 1 + part * result / k
    return power(result, 256)


def sqrt(values: Tensor) -> Tensor:
    """The correctly rounded square root. torch's own on the CPU may be off by one unit.

    The root of a float32 is computed in float64 and rounded to float32. This gives the correctly
    rounded result, as float64's 53 bits are more than twice 24 (Figueroa, 1995, "When is double
    rounding innocuous?").
    """
    if values.dtype == torch.float32:
        return values.to(torch.float64).sqrt().to(torch.float32)
    if values.device.type == "cpu":
        return values.clone().apply_(math.sqrt)
    return values.sqrt()


def sign(values: Tensor) -> Tensor:
    """1, -1 or 0; 0 of nan."""
    return (values > 0).to(values.dtype) - (values < 0).to(values.dtype)


def scaled(grad: Tensor, factor: float | Tensor) -> Tensor:
    """Multiplies a float32 or float64 gradient by a factor (float64, >= 0) that is rounded once.

    Huge gradients and a tiny limit may lead to a factor below float32's normal numbers. Such a
    factor is applied in two multiplications, the first by a power of two. If `factor` is a tensor,
    it holds one factor per row.
    """
    factor = torch.as_tensor(factor, dtype=torch.float64, device=grad.device)
    if grad.dtype == torch.float64:
        return grad * factor
    tiny = (factor < 2.0**-126) & (factor > 0)
    at_once = grad * factor.to(torch.float32)
    if not tiny.any():
        return at_once
    in_two = (grad * 2.0**-126) * (factor * 2.0**126).to(torch.float32)
    return torch.where(tiny, in_two, at_once)


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def is_subclass(tensor: Tensor) -> bool:
    """Whether operations on this tensor are not torch's own: there may be no memory behind it."""
    dispatch = getattr(type(tensor), "__torch_dispatch__", None)
    return dispatch is not torch._C._disabled_torch_dispatch_impl


def can_be_updated(param: Tensor) -> bool:
    """Whether it is of a kind that a step can update; any other one is left alone."""
    return (
        not is_subclass(param)
        and param.layout == torch.strided
        and not param.is_nested
        and param.dtype in DTYPES
        and param.device.type != "meta"
    )


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that a parameter of this dtype is updated in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cast_grad(grad: Tensor, param: Tensor) -> Tensor:
    """The gradient as it is, if it has its parameter's dtype; else in `compute_dtype`."""
    return grad if grad.dtype == param.dtype else grad.to(compute_dtype(param.dtype))
