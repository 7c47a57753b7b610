"""Clipping alone: measures the norm of a list of gradients, and scales them in place."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fusedopt.reference import norms
from fusedopt.reference.arithmetic import compute_dtype, scaled
from fusedopt.reference.coefficients import clip_coefficient


@torch.no_grad()
def total_norm(grads: list[Tensor], norm_type: float) -> Tensor:
    """The norm over all gradients: 0-d float64, on the first gradient's device.

    The norm of order 2 is summed as `fusedopt.reference.norms` says. An empty gradient counts as
    zeros. It has no norm of a negative order: torch raises a RuntimeError.
    """
    if norm_type == 2.0:
        norm = math.sqrt(norms.sum_of_squares((grad, grad) for grad in grads))
        return torch.tensor(norm, dtype=torch.float64, device=grads[0].device)
    each = [
        torch.linalg.vector_norm(grad, norm_type, dtype=torch.float64).to(grads[0].device)
        for grad in grads
        if grad.numel() > 0 or norm_type < 0
    ]
    if not each:
        return torch.zeros((), dtype=torch.float64, device=grads[0].device)
    return torch.linalg.vector_norm(torch.stack(each), norm_type)


@torch.no_grad()
def clip_grads(
    grads: list[Tensor],
    max_norm: float,
    norm_type: float,
    skip_nonfinite: bool,
    known_norm: Tensor | float | None,
) -> tuple[Tensor | None, bool]:
    """Clips gradients in place. A gradient that is listed several times is scaled once.

    Returns:
        Their norm (0-d float64; None if `grads` is empty), and whether any gradient is float64.
    """
    if not grads:
        return None, False
    norm = total_norm(grads, norm_type) if known_norm is None else torch.as_tensor(known_norm)
    norm = norm.to(grads[0].device, torch.float64).reshape(())
    factor = clip_coefficient(max_norm, norm.item())
    if factor != 1.0 and (norm.isfinite() or not skip_nonfinite):
        for grad in {(grad.data_ptr(), grad.numel()): grad for grad in grads}.values():
            grad.copy_(scaled(grad.to(compute_dtype(grad.dtype)), factor).to(grad.dtype))
    return norm, any(grad.dtype == torch.float64 for grad in grads)
