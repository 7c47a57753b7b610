"""Steps without compiled kernels: torch's own fused and foreach functions, and our decisions.

A step skips, unscales and clips as the kernels do, and sums the norm in float64. It rounds as torch
does, and it waits for the device. Telemetry and adaptive limits need the reference instead. If no
function of torch's keeps our promises for a parameter, the reference's formula updates it: see
`_method`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusedopt import reference
from fusedopt.reference import Group, Rule, StepOptions

# The number of elements that are copied at once, of gradients to scale or to read in float64. The
# copies use the same memory again, which stays in cache.
BLOCK = 1 << 18
FUSED, FOREACH, REFERENCE = "fused", "foreach", "reference"

States = dict[Tensor, dict[str, Tensor]]


@dataclass
class Piece:
    """A parameter with its state, or a part of a large one."""

    owner: Tensor
    begin: int | None  # None: all of it
    param: Tensor
    state: dict[str, Tensor]

    def grad(self) -> Tensor:
        assert self.owner.grad is not None
        if self.begin is None:
            return self.owner.grad
        return _flat(self.owner.grad)[self.begin : self.begin + self.param.numel()]


@dataclass
class Batch:
    """Pieces of one group that one call of a torch function updates."""

    group: int
    method: str
    pieces: list[Piece]
    scalars: list[tuple[Tensor, Tensor]]  # (copy, original): all pieces but the last advance copies

    def numel(self) -> int:
        return sum(piece.param.numel() for piece in self.pieces)


class TorchPlan:
    """A `Plan` without kernels. Its tensors have been checked and have their states.

    `step` compares all tensors with the ones that were checked. If they have changed, the optimizer
    checks them and makes a new plan.
    """

    def __init__(
        self, rule: Rule, param_groups: list[Group], state: States, counters: dict[Tensor, Tensor]
    ) -> None:
        self._rule = rule
        self._looks = list(_looks(rule, param_groups, state))
        self._places = _places(param_groups)
        self._batches: list[Batch] = []
        for param, (index, _) in self._places.items():
            param_state = dict(state.get(param, {}))
            if rule.hidden_step:
                param_state[rule.counter] = counters[param]
            self._add(index, param_groups[index], param, param_state)

    def _add(self, index: int, group: Group, param: Tensor, state: dict[str, Tensor]) -> None:
        names = self._rule.states(group)
        tensors = [_grad(param), *(state[name] for name in names)]
        method = _method(self._rule, group, param, tensors)
        if method == REFERENCE or param.numel() <= BLOCK or not _aligned(param, tensors):
            self._append(index, method, Piece(param, None, param, state), [])
            return
        flat_states = {name: _flat(state[name]) for name in names}
        scalars = {name: state[name] for name in {*self._rule.scalars, self._rule.counter}}
        for begin in range(0, param.numel(), BLOCK):
            end = begin + BLOCK
            last = end >= param.numel()
            own = scalars if last else {name: it.clone() for name, it in scalars.items()}
            own_state = {**own, **{name: it[begin:end] for name, it in flat_states.items()}}
            copies = [] if last else [(own[name], it) for name, it in scalars.items()]
            piece = Piece(param, begin, _flat(param.detach())[begin:end], own_state)
            self._append(index, method, piece, copies)

    def _append(
        self, index: int, method: str, piece: Piece, scalars: list[tuple[Tensor, Tensor]]
    ) -> None:
        before = self._batches[-1] if self._batches else None
        if (
            before is None
            or (before.group, before.method) != (index, method)
            or before.pieces[0].param.device != piece.param.device
            or before.numel() + piece.param.numel() > 2 * BLOCK
        ):
            self._batches.append(before := Batch(index, method, [], []))
        before.pieces.append(piece)
        before.scalars += scalars

    def step(
        self,
        param_groups: list[Group],
        state: States,
        max_grad_norm: float,
        measure: bool,
        skip_nonfinite: bool,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        clip: object | None,
        control: Tensor,
        exchange: object | None = None,
    ) -> bool:
        """Takes one whole step. Returns False, and changes nothing, if this plan no longer fits."""
        if clip is not None or exchange is not None or not self._fits(param_groups, state):
            return False
        options = StepOptions(max_grad_norm, measure, skip_nonfinite, grad_scale, found_inf)
        with torch.no_grad():
            norm = self._norm(param_groups, total_norm if measure else _norm_to_read)
            decision = reference.decide(options, norm * norm if measure else 0.0)
            if not decision.skip:
                for batch in self._batches:
                    group = param_groups[batch.group]
                    clipped = reference.is_clipped(group)
                    factor = decision.grad_factor if clipped else decision.inv_scale
                    self._update(batch, group, factor)
            if not measure:
                decision = reference.decide(options, norm * norm)
            reference.write_readings(control, norm * norm, decision)
        return True

    def _norm(self, param_groups: list[Group], norm_of: Callable[[list[Tensor]], float]) -> float:
        """The norm over the gradients that are clipped. inf and nan count in any group."""
        grads: dict[bool, list[Tensor]] = {True: [], False: []}
        for param, (index, _) in self._places.items():
            grads[reference.is_clipped(param_groups[index])].append(_grad(param))
        others = norm_of(grads[False])
        return norm_of(grads[True]) + (0.0 if math.isfinite(others) else others)

    def _fits(self, param_groups: list[Group], state: States) -> bool:
        looks = _looks(self._rule, param_groups, state)
        end = object()
        return all(map(operator.eq, looks, self._looks)) and next(looks, end) is end

    def _update(self, batch: Batch, group: Group, factor: float) -> None:
        if batch.method == REFERENCE:
            for piece in batch.pieces:
                reference.update(self._rule, group, piece.param, piece.state, factor)
            return
        for copy, scalar in batch.scalars:
            copy.copy_(scalar)
        grads = [piece.grad() for piece in batch.pieces]
        if factor != 1.0:  # into copies, as a step doesn't write gradients
            grads = list(torch._foreach_mul(grads, factor))  # pyright: ignore[reportPrivateImportUsage]
        params = [piece.param for piece in batch.pieces]
        states = [piece.state for piece in batch.pieces]
        assert self._rule.twin is not None
        self._rule.twin.step(group, params, grads, states, batch.method == FUSED)

    def shared_memory(self) -> None:
        """None: shared memory does no harm here, as torch updates one parameter after the other."""

    def nonfinite(self) -> list[tuple[int, int]]:
        """(group, index in the group) of the parameters whose gradients hold inf or nan."""
        places = self._places.items()
        return [place for param, place in places if not _grad(param).isfinite().all()]


def total_norm(
    grads: list[Tensor], norm_type: float = 2.0, dtype: torch.dtype = torch.float64
) -> float:
    """The norm of order 2 or inf of all gradients, summed in `dtype` over a block of elements."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for grad in grads:
        by_device.setdefault(grad.device, []).append(grad)
    norms = [_norm_on_device(grads, norm_type, dtype) for grads in by_device.values()]
    return torch.linalg.vector_norm(torch.tensor(norms, dtype=torch.float64), norm_type).item()


def _norm_to_read(grads: list[Tensor]) -> float:
    """The norm of order 2 for a step that doesn't depend on it: in float32 if the squares fit.

    That is several times as fast as float64, which converts every element.
    """
    if all(grad.dtype == torch.float32 for grad in grads):
        norm = total_norm(grads, 2.0, torch.float32)
        if 1e-10 < norm < 1e15:
            return norm
    return total_norm(grads, 2.0)


def _norm_on_device(grads: list[Tensor], norm_type: float, dtype: torch.dtype) -> float:
    blocks = _blocks(grads)
    if any(grad.dtype != dtype for grad in grads):
        size = min(BLOCK, sum(grad.numel() for grad in grads))
        buffer = torch.empty(size, dtype=dtype, device=grads[0].device)
        blocks = (buffer[: block.numel()].copy_(block) for block in blocks)
    norms = [torch.linalg.vector_norm(block, norm_type) for block in blocks]
    return torch.linalg.vector_norm(torch.stack(norms).double(), norm_type).item() if norms else 0.0


def _blocks(grads: list[Tensor]) -> Iterator[Tensor]:
    """All elements, in tensors of at most `BLOCK` elements. Small gradients are joined."""
    joined: list[Tensor] = []
    size = 0
    for grad in grads:
        flat = grad if grad.dim() == 1 else grad.reshape(-1)
        for part in flat.split(BLOCK) if grad.numel() > BLOCK else (flat,):
            if size + part.numel() > BLOCK and joined:
                yield joined[0] if len(joined) == 1 else torch.cat(joined)
                joined, size = [], 0
            joined.append(part)
            size += part.numel()
    if size > 0:
        yield torch.cat(joined)


@torch.no_grad()
def clip_grads(
    grads: list[Tensor],
    max_norm: float,
    norm_type: float,
    skip_nonfinite: bool,
    known_norm: Tensor | float | None,
) -> tuple[Tensor | None, bool]:
    """Clips gradients in place; arguments and result are those of `reference.clip_grads`."""
    if grads and known_norm is None:
        norm = total_norm(grads, norm_type)
        known_norm = torch.tensor(norm, dtype=torch.float64, device=grads[0].device)
    return reference.clip_grads(grads, max_norm, norm_type, skip_nonfinite, known_norm)


def _method(rule: Rule, group: Group, param: Tensor, tensors: list[Tensor]) -> str:
    """Chooses the function that updates a parameter with this gradient and these states.

    torch's functions take tensors of one dtype. Its fused ones on the CPU assume equal strides. Its
    foreach functions round 16-bit numbers after every operation.
    """
    twin = rule.twin
    if twin is None or not twin.suits(group) or any(it.dtype != param.dtype for it in tensors):
        return REFERENCE
    fused = param.dtype in twin.fused_dtypes and param.device.type in ("cpu", "cuda")
    if fused and _aligned(param, tensors):
        return FUSED
    return FOREACH if param.dtype in (torch.float32, torch.float64) else REFERENCE


def _aligned(param: Tensor, tensors: list[Tensor]) -> bool:
    """Whether all tensors have the same strides, without gaps."""
    dense = torch.empty_like(param, device="meta").stride()
    return all(type(it) is Tensor and it.stride() == dense for it in (param.detach(), *tensors))


def _flat(tensor: Tensor) -> Tensor:
    """The elements of a tensor without gaps, in memory order."""
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())


def _places(param_groups: list[Group]) -> dict[Tensor, tuple[int, int]]:
    """(group, index in the group) of every parameter that has a gradient."""
    places: dict[Tensor, tuple[int, int]] = {}
    for index, group in enumerate(param_groups):
        for position, param in enumerate(group["params"]):
            if param.grad is not None:
                places.setdefault(param, (index, position))
    return places


def _grad(param: Tensor) -> Tensor:
    assert param.grad is not None
    return param.grad


def _looks(rule: Rule, param_groups: list[Group], state: States) -> Iterator[Any]:
    """Everything that a plan depends on, as values that can be compared."""
    for group in param_groups:
        yield rule.states(group)
        yield group.get("clipped", True)
        for param in group["params"]:
            yield id(param)
            yield _look(param)
            yield _look(param.grad)
            for name, value in state.get(param, {}).items():
                yield name
                yield id(value)
                yield value.data_ptr() if type(value) is Tensor else None


def _look(value: Any) -> Any:
    """The layout and memory of a tensor. For a subclass or another object, its identity."""
    if type(value) is not Tensor and type(value) is not torch.nn.Parameter:
        return id(value)
    if value.layout != torch.strided:
        return value.layout
    offset, size = value.storage_offset(), value.untyped_storage().nbytes()
    return value.dtype, value.device, value.shape, value.stride(), offset, size
