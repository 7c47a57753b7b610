"""Clipping by itself over several ranks: this rank's gradients, and their norm over all ranks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fusedopt import distributed
from fusedopt.core import backends, sharding
from fusedopt.core.checked_grads import checked_grads
from fusedopt.distributed import (
    Exchange,
    Ranks,
    announce,
    counted_chunks,
    is_dtensor,
    is_placed_as,
    local_of,
    not_sharded,
    placed_as,
    without_partial,
)
from fusedopt.reference import Control, message, norms, total_norm

_RULE = "scale"  # the kernels' rule that keeps no state: its step measures, and is then skipped


def find_ranks(tensors: list[Tensor], process_group: Any, plain: str) -> Ranks | None:
    """The ranks that a call is over; None: this rank alone.

    Raises:
        RuntimeError: a parameter is a part of FullyShardedDataParallel's, and nothing says so.
    """
    if plain != "own":
        _check_whole(tensors)
    if process_group is None and not _has_dtensors(tensors):
        return None
    return distributed.find_ranks([{"params": tensors}], process_group, plain, "clipping")


def with_local_grads(tensors: list[Any]) -> list[Any]:
    """Plain tensors that have this rank's part of the gradients."""
    if not _has_dtensors(tensors):
        return tensors
    for index, tensor in enumerate(tensors):
        if is_dtensor(tensor) and not (tensor.grad is None or is_dtensor(tensor.grad)):
            raise not_sharded(tensor.grad, f"parameter {index}")
    return [_with_grad(it, it.grad) if is_dtensor(it) else it for it in tensors]


class RankClip:
    """One call over several ranks: this rank's part of the gradients.

    Attributes:
        grads: what is to be scaled, plain tensors. Filled by `measure`.
    """

    def __init__(
        self, ranks: Ranks, tensors: list[Any], of_params: bool, backend: str | None
    ) -> None:
        self.grads: list[Tensor] = []
        self._ranks = ranks
        self._tensors = tensors
        self._of_params = of_params
        self._backend = backend

    def measure(self, max_norm: float, norm_type: float) -> tuple[Tensor, bool]:
        """The norm over all ranks, 0-d float64, and whether any rank has a float64 gradient.

        Raises:
            PeerError: another rank refused the call, or was asked for another one.
        """
        exchange = Exchange(self._ranks, f"max_norm={max_norm}, norm_type={norm_type}")
        with exchange.joined():
            self._check(max_norm)
            exchange.is_wide = any(grad.dtype == torch.float64 for grad in self.grads)
            norm = self._norm(exchange, norm_type)
        device = self.grads[0].device if self.grads else self._ranks.device
        return torch.tensor(norm, dtype=torch.float64, device=device), exchange.is_wide

    def _check(self, max_norm: float) -> None:
        """Refuses gradients by name, and tells the ranks that would redistribute theirs."""
        try:
            local = with_local_grads(self._tensors)
            if not self._of_params:
                local = [local_of(it) for it in self._tensors]
            self.grads = checked_grads(local, self._of_params, self._backend, max_norm)
        except Exception:
            announce(True, self._misplaced())
            raise
        announce(False, self._misplaced())

    def _misplaced(self) -> list[Any]:
        """The meshes over which gradients are to be redistributed before they are measured."""
        found = {}
        for tensor in filter(is_dtensor, self._tensors):
            grad = tensor.grad if self._of_params else tensor
            if is_dtensor(grad) and not self._is_placed(tensor, grad):
                found[tensor.device_mesh] = None
        return list(found)

    def _is_placed(self, tensor: Any, grad: Any) -> bool:
        if self._of_params:
            return is_placed_as(tensor, grad)
        return not any(placement.is_partial() for placement in grad.placements)

    def _norm(self, exchange: Exchange, norm_type: float) -> float:
        measured, counts = self._measured()
        if norm_type == 2.0:
            exchange.counted = counted_chunks(measured, counts)
            return math.sqrt(_sum_of_squares(measured, exchange, self._backend))
        grads = [it.grad for it, counted in zip(measured, counts, strict=True) if counted]
        own = total_norm(grads, norm_type).item() if grads else None
        exchange([])
        norms_of_ranks = [norm for _, norm in self._ranks.gather(own) if norm is not None]
        found = torch.tensor(norms_of_ranks, dtype=torch.float64)
        return torch.linalg.vector_norm(found, norm_type).item() if norms_of_ranks else 0.0

    def _measured(self) -> tuple[list[Any], list[bool]]:
        """Plain tensors with gradients laid out as they are, and which of them this rank counts."""
        measured, counts = [], []
        for tensor in self._tensors:
            grad = tensor.grad if self._of_params else tensor
            if grad is None:
                continue
            if is_dtensor(tensor):
                grad = placed_as(tensor, grad) if self._of_params else without_partial(tensor)
                tensor = tensor if self._of_params else grad
            measured.append(_with_grad(tensor, grad))
            counts.append(self._ranks.counts(tensor, {}))
        return measured, counts


def _has_dtensors(tensors: list[Tensor]) -> bool:
    all_plain = {*map(type, tensors)} <= {Tensor, torch.nn.Parameter}
    return not all_plain and any(map(is_dtensor, tensors))


def _check_whole(tensors: list[Tensor]) -> None:
    for index, tensor in enumerate(tensors):
        part = sharding.sharded_param(tensor, f"parameter {index}")
        if part is not None:
            raise RuntimeError(f"{part}: as it is, each rank would clip by a norm of its own")


def _with_grad(tensor: Any, grad: Any) -> Any:
    """A plain tensor that lies where this rank's part of `tensor` does, with its gradient."""
    local = local_of(tensor).detach()
    if grad is not None:
        grad = local_of(grad).detach()
        local.grad_dtype = grad.dtype
        local.grad = grad
    return local


def _sum_of_squares(params: list[Tensor], exchange: Exchange, backend: str | None) -> float:
    """As an optimizer's step measures these parameters."""
    if not _measure_in_kernels(params, exchange, backend):
        sums = norms.chunk_sums_by_device((param, param.grad) for param in params)
        exchange([*map(message.write, sums, exchange.counted)])
    return message.sum_of_squares(exchange.read())


def _measure_in_kernels(params: list[Tensor], exchange: Exchange, backend: str | None) -> bool:
    """A step that is always skipped. Returns whether the kernels took these tensors."""
    devices = [param.device for param in params]
    chosen = backends.choose(backend, devices, "norms over several ranks")
    if chosen == backends.REFERENCE or not params:
        return False
    groups: list[dict[str, Any]] = [{"params": params}]
    control = torch.zeros(Control.SIZE, dtype=torch.float64, device=devices[0])
    plan = backends._C.Plan(_RULE, chosen or "", groups, {}, {}, [])
    exchange.ask(torch.ones(()), False)  # for a skip
    return plan.step(groups, {}, math.inf, True, True, None, None, None, control, exchange)
