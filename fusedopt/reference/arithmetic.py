"""Arithmetic that gives the same bits in Python, C++ and CUDA, and the types that it is done in."""

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


def sqrt(values: Tensor) -> Tensor:
    """The correctly rounded square root; torch's own on the CPU may be one unit off.

    That of a float32 is correct by way of float64, whose 53 bits are more than twice 24 (Figueroa,
    1995, "When is double rounding innocuous?").
    """
    if values.dtype == torch.float32:
        return values.to(torch.float64).sqrt().to(torch.float32)
    if values.device.type == "cpu":
        return values.clone().apply_(math.sqrt)
    return values.sqrt()


def scaled(grad: Tensor, factor: float | Tensor) -> Tensor:
    """A float32 or float64 gradient times a factor (float64, >= 0) that is rounded once.

    A factor below float32's normal numbers, as huge gradients and a tiny limit give it, is applied
    in two steps, of which the first is a power of two. A tensor holds a factor per row.
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
        and param.dtype in DTYPES
        and param.device.type != "meta"
    )


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that a parameter of this dtype is updated in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cast_grad(grad: Tensor, param: Tensor) -> Tensor:
    """A gradient in the dtype that it is read in: its parameter's, or the one computed in."""
    return grad if grad.dtype == param.dtype else grad.to(compute_dtype(param.dtype))
