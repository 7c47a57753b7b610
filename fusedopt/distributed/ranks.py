"""The ranks that step together, and which of them counts a parameter's gradient."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fusedopt.distributed.local_view import is_dtensor
from fusedopt.reference import Group, distinct_params

Item = TypeVar("Item")

PLAIN = ("replicated", "own")


class Ranks:
    """The ranks of a process group or a mesh.

    Attributes:
        groups: the process groups that a message is reduced over, one after the other.
        size: how many ranks there are.
        device: where a message must lie.
    """

    def __init__(self, of: Any, plain: str) -> None:
        self._plain = plain
        is_mesh = isinstance(of, dist.device_mesh.DeviceMesh)
        members = of.mesh.flatten().tolist() if is_mesh else dist.get_process_group_ranks(of)
        self.size = len(members)
        self._members = frozenset(members)
        self.groups: list[Any] = [of] if not is_mesh else of.get_all_groups()
        if is_mesh and self.size == dist.get_world_size():
            self.groups = [dist.group.WORLD]
        self.device = device_of(self.groups[0])
        self._is_first = dist.get_rank() == members[0]

    @property
    def on_host(self) -> bool:
        """Whether the host has a message's total without waiting for a GPU."""
        return self.device.type == "cpu"

    @staticmethod
    def of(param_groups: list[Group], process_group: Any, plain: str) -> Ranks | None:
        """Those that were named, or those of the parameters' mesh. None: this rank steps alone.

        Raises:
            ValueError: the parameters' meshes have no root in common.
        """
        if process_group is not None:
            return Ranks(process_group, plain)
        meshes = meshes_of(param_groups)
        if not meshes:
            return None
        if len(meshes) == 1:
            return Ranks(meshes[0], plain)
        roots = {root_of(mesh) for mesh in meshes}
        if len(roots) > 1:
            told = ", ".join(sorted(map(str, roots)))
            raise ValueError(
                f"the parameters lie on meshes without a common root: {told}; expected "
                "process_group=, a process group or mesh of all ranks that step together"
            )
        return Ranks(roots.pop(), plain)

    def counts(self, param: Tensor, group: Group) -> bool:
        """Whether this rank adds its part of the parameter's gradient to the sum of squares."""
        if not group.get("counted", True):
            return False
        if not is_dtensor(param):
            return self._plain == "own" or self._is_first
        tensor: Any = param
        mesh = tensor.device_mesh
        coordinate = mesh.get_coordinate()
        if coordinate is None:
            return False
        places = zip(coordinate, tensor.placements, strict=True)
        is_copy = any(place for place, it in places if it.is_replicate())
        return not is_copy and self._counts_submesh(mesh)

    def _counts_submesh(self, mesh: Any) -> bool:
        """Whether this rank counts a parameter of a submesh, which does not hold all ranks.

        Each copy of the submesh in its root holds such a parameter, replicated or its own, as
        `plain` says. If it is replicated, the copy with the first rank counts it.
        """
        members, root = set(mesh.mesh.flatten().tolist()), root_of(mesh)
        if self._plain == "own" or members >= self._members or root == mesh:
            return True
        first = min(self._members & set(root.mesh.flatten().tolist()))
        return first in members

    def gather(self, item: Item) -> list[tuple[int, Item]]:
        """Every rank's item, with its global rank, in the order of the ranks."""
        items: list[Any] = [(dist.get_rank(), item)]
        for group in self.groups:
            found: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(found, items, group=group)
            items = [it for part in found for it in part]
        return sorted(items, key=lambda it: it[0])


def replica_of(param: Any, plain: str) -> tuple[Any, ...] | None:
    """What ranks have in common that hold the same part of a parameter. None: no other rank does.

    For a DTensor it is this rank's place in the dimensions of the mesh that cut it.
    """
    if not is_dtensor(param):
        return None if plain == "own" else ()
    mesh = param.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return None
    places = zip(coordinate, param.placements, strict=True)
    cuts = tuple(-1 if it.is_replicate() else place for place, it in places)
    copies = tuple(mesh.mesh.flatten().tolist()) if plain == "own" else ()
    return cuts, copies


def meshes_of(param_groups: list[Group]) -> list[Any]:
    """The meshes of the parameters that are DTensors, in the order of the parameters."""
    params: list[Any] = [param for _, param in distinct_params(param_groups)]
    return list(dict.fromkeys(param.device_mesh for param in params if is_dtensor(param)))


def has_dtensors(param_groups: list[Group]) -> bool:
    return any(is_dtensor(param) for group in param_groups for param in group["params"])


def device_of(group: Any) -> torch.device:
    """Where a message over this group must lie."""
    on_cuda = dist.get_backend(group) == "nccl"
    return torch.device(f"cuda:{torch.cuda.current_device()}" if on_cuda else "cpu")


def root_of(mesh: Any) -> Any:
    """The mesh that this one was cut out of, or itself."""
    if hasattr(mesh, "_get_root_mesh"):
        return mesh._get_root_mesh()
    return torch.distributed.device_mesh._mesh_resources.get_root_mesh(mesh)
