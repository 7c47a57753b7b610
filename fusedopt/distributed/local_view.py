"""Sharded parameters as the kernels see them: groups and state of this rank's plain tensors."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fusedopt.reference import Group
from fusedopt.reference.arithmetic import can_be_updated
from fusedopt.reference.groups import name_of
from fusedopt.reference.norms import CHUNK_SIZE

States = dict[Tensor, dict[str, Any]]
Announce = Callable[[bool, Iterable[Any]], None]
PartOf = Callable[[Any], Any]


def is_dtensor(value: object) -> bool:
    """Whether it is a DTensor of torch. Its attributes tell, so that no module is imported."""
    return hasattr(value, "_local_tensor") and hasattr(value, "placements")


def local_of(value: Any) -> Any:
    """This rank's part of a DTensor; anything else as it is."""
    return value._local_tensor if is_dtensor(value) else value


def whole(value: Any) -> Any:
    """All of a DTensor, which communicates; anything else as it is."""
    return value.full_tensor() if is_dtensor(value) else value


class LocalView:
    """An optimizer's groups and state as this rank's plain tensors, which share their memory.

    The gradients of sharded parameters are on the local tensors from `take_grads` until `end`.

    Args:
        extension: finds the extension, which does the same in less time, or None. A function can
            be copied and pickled, a module can't.
    """

    def __init__(self, extension: Callable[[], Any]) -> None:
        self.groups: list[Group] = []
        self.state: States = {}
        self.counters: dict[Tensor, Tensor] = {}
        self._extension = extension
        self._seen: list[Any] = []
        # The parameters that are DTensors, their local tensors, and the layouts of their gradients.
        # A layout is known, and not None, once it was found to be the parameter's.
        self._dtensors: list[Any] = []
        self._locals: list[Tensor] = []
        self._layouts: list[Any] = []

    def look(
        self,
        param_groups: list[Group],
        state: States,
        counters: dict[Tensor, Tensor],
        part_of: PartOf = local_of,
    ) -> bool:
        """Looks at everything again. Returns whether all tensors are those of the last look.

        Args:
            part_of: gives this rank's plain tensor for a parameter, always the same one.
        """
        same = self._is_same(param_groups, state)
        if not same:
            self._seen = _objects(param_groups, state)
            self.groups = [
                {"params": [part_of(param) for param in group["params"]]} for group in param_groups
            ]
            self.state = {
                local_of(key): _local_values(value) if isinstance(value, dict) else value
                for key, value in state.items()
            }
            params: list[Any] = [param for group in param_groups for param in group["params"]]
            self._dtensors = [param for param in params if is_dtensor(param)]
            self._locals = [*map(local_of, self._dtensors)]
            self._layouts = [None] * len(self._dtensors)
        self.counters = {local_of(param): value for param, value in counters.items()}
        for own, group in zip(self.groups, param_groups, strict=True):
            params = own["params"]
            own.clear()
            own.update(group, params=params)
        return same

    def take_grads(self, param_groups: list[Group], announce: Announce) -> None:
        """Gives the local tensors their gradients. Communicates where these are placed otherwise.

        Args:
            announce: is told before that whether this rank has failed, and the meshes.

        Raises:
            TypeError: a DTensor has a gradient that is no DTensor.
        """
        compiled = self._extension()
        known = compiled is not None and compiled.take_local_grads(
            self._dtensors, self._locals, self._layouts
        )
        if not known:
            self.end()
            self._place_grads(param_groups, announce)

    def end(self) -> None:
        """Takes the gradients off the local tensors."""
        compiled = self._extension()
        if compiled is not None:
            compiled.drop_local_grads(self._locals)
            return
        for local in self._locals:
            local.grad = None

    def _is_same(self, param_groups: list[Group], state: States) -> bool:
        compiled = self._extension()
        if compiled is not None:
            return compiled.is_same_view(self._seen, param_groups, state)
        seen = _objects(param_groups, state)
        return len(seen) == len(self._seen) and all(map(operator.is_, seen, self._seen))

    def _place_grads(self, param_groups: list[Group], announce: Announce) -> None:
        error, misplaced = None, {}
        for g, group in enumerate(param_groups):
            for i, param in enumerate(group["params"]):
                grad = param.grad if is_dtensor(param) else None
                if grad is not None and not is_dtensor(grad):
                    error = not_sharded(grad, name_of(param_groups, g, i))
                elif grad is not None and not is_placed_as(param, grad):
                    misplaced[param.device_mesh] = None
        if misplaced:
            announce(error is not None, misplaced)
        if error is not None:
            raise error
        for index, param in enumerate(self._dtensors):
            grad = param.grad
            if grad is not None:
                placed = placed_as(param, grad)
                self._locals[index].grad = placed._local_tensor
                self._layouts[index] = getattr(grad, "_spec", None) if placed is grad else None


def counted_chunks(params: list[Tensor], counts: list[bool]) -> list[Tensor]:
    """By device, which chunks are counted: bool, shape (chunks,), in the kernels' order.

    Args:
        params: this rank's plain tensors.
        counts: for each of them, whether this rank counts it.
    """
    chunks: dict[torch.device, list[Tensor]] = {}
    for param, counted in zip(params, counts, strict=True):
        if param.device.type in ("cpu", "cuda"):
            number = -(-param.numel() // CHUNK_SIZE) if can_be_updated(param) else 0
            chunks.setdefault(param.device, []).append(
                torch.full((number,), counted, device=param.device)
            )
    return [torch.cat(it) for it in chunks.values()]


def _objects(param_groups: list[Group], state: States) -> list[Any]:
    """All objects that a view is made of, in the order that csrc/torch/local_view.cpp has too."""
    found: list[Any] = []
    for group in param_groups:
        found.append(group)
        for param in group["params"]:
            found += param, local_of(param)
    for key, entry in state.items():
        found += key, local_of(key), entry
        if isinstance(entry, dict):
            for name, value in entry.items():
                found += name, value, local_of(value)
    return found


def _local_values(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: local_of(value) for key, value in entry.items()}


def not_sharded(grad: object, name: str) -> TypeError:
    """Refuses a gradient of a DTensor that is none itself."""
    return TypeError(
        f"the gradient of {name} is a {type(grad).__name__}; expected a DTensor, as the parameter "
        "is"
    )


def check_placements(states: Iterable[str], param: Any, saved: dict[str, Any], name: str) -> None:
    """Refuses states that are not laid out over the mesh as their parameter is."""
    for key in states:
        value = saved.get(key)
        if not isinstance(value, Tensor) or _layout(value) == _layout(param):
            continue
        raise ValueError(
            f"state {key!r} of {name} is {_described(value)}; expected {_described(param)}, as "
            "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict makes it"
        )


def _layout(value: Any) -> Any:
    return (value.device_mesh, value.placements) if is_dtensor(value) else None


def _described(value: Any) -> str:
    if not is_dtensor(value):
        return "a plain tensor"
    return f"a DTensor with {value.placements} on {value.device_mesh}"


def is_placed_as(param: Any, grad: Any) -> bool:
    """Whether a DTensor is laid out over the mesh as a parameter is.

    It is not after tensor parallelism, which leaves `Partial` gradients.
    """
    return grad.placements == param.placements and grad.device_mesh == param.device_mesh


def placed_as(param: Any, grad: Any) -> Any:
    """A DTensor laid out over the mesh as a parameter is. Communicates where it was not."""
    if is_placed_as(param, grad):
        return grad
    return grad.redistribute(param.device_mesh, param.placements)


def without_partial(tensor: Any) -> Any:
    """A DTensor whose `Partial` placements are added up. Communicates where there are any."""
    from torch.distributed.tensor import Replicate  # loaded by whoever has a DTensor

    if not any(placement.is_partial() for placement in tensor.placements):
        return tensor
    placements = [Replicate() if it.is_partial() else it for it in tensor.placements]
    return tensor.redistribute(tensor.device_mesh, placements)
