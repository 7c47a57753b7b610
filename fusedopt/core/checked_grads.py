"""The gradients of a call that only clips: refused by name, or fit to be measured and scaled."""

from __future__ import annotations

import math

from torch import Tensor

from fusedopt.core import backends, checks


def checked_grads(
    tensors: list[Tensor], of_params: bool, backend: str | None, max_norm: float
) -> list[Tensor]:
    """The gradients that there are, all fit to be measured and, if need be, scaled."""
    if of_params:
        grads = {f"the gradient of parameter {i}": p.grad for i, p in enumerate(tensors)}
        grads = {name: grad for name, grad in grads.items() if grad is not None}
    else:
        grads = {f"tensor {i}": tensor for i, tensor in enumerate(tensors)}
    for name, grad in grads.items():
        checks.check_readable(grad, name)
        checks.check_device(grad, name, backend)
        if grad._is_zerotensor():
            raise TypeError(f"{name} is zero without any memory; expected a plain tensor: .clone()")
        if max_norm != math.inf:
            checks.check_writable(grad, name)
    if max_norm != math.inf and backend != "reference":
        _check_overlap(grads)
    return list(grads.values())


def _check_overlap(grads: dict[str, Tensor]) -> None:
    """Refuses gradients that share some memory: they would be scaled at once."""
    pair = None if backends._C is None else backends._C.first_overlap(list(grads.values()))
    if pair is not None:
        first, second = (list(grads)[index] for index in pair)
        raise RuntimeError(
            f"{second} shares memory with {first}, and both are scaled at once; expected memory of "
            "its own: .clone() it"
        )
