"""The compiled extension, csrc/torch/bindings.cpp."""

from typing import Any

from torch import Tensor

from fusedopt.reference import message

built_with_cuda: bool
cuda_device_type: str
constants: dict[str, Any]

def cpu_isa() -> str: ...
def prefer_huge_pages(tensor: Tensor) -> None: ...
def clip_grads(
    tensors: list[Tensor],
    of_params: bool,
    checked: bool,
    backend: str,
    max_norm: float,
    norm_type: float,
    skip_nonfinite: bool,
    total_norm: Tensor | float | None,
) -> tuple[Tensor | None, bool] | None: ...
def is_same_view(
    seen: list[Any], param_groups: list[dict[str, Any]], state: dict[Tensor, Any]
) -> bool: ...
def take_local_grads(params: list[Tensor], locals: list[Tensor], layouts: list[Any]) -> bool: ...
def drop_local_grads(locals: list[Tensor]) -> None: ...
def swap_grads(params: list[Tensor], grads: list[Tensor | None]) -> list[Tensor | None] | None: ...
def first_overlap(grads: list[Tensor]) -> tuple[int, int] | None: ...

class Plan:
    def __init__(
        self,
        rule: str,
        backend: str,
        param_groups: list[dict[str, Any]],
        state: dict[Tensor, dict[str, Tensor]],
        counters: dict[Tensor, Tensor],
        rings: list[Tensor],
    ) -> None: ...
    def step(
        self,
        param_groups: list[dict[str, Any]],
        state: dict[Tensor, dict[str, Tensor]],
        max_grad_norm: float,
        measure: bool,
        skip_nonfinite: bool,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        clip: tuple[int, list[float], Tensor] | None,
        control: Tensor,
        exchange: message.Exchange | None = None,
    ) -> bool: ...
    def shared_memory(self) -> tuple[tuple[int, int, str], tuple[int, int, str]] | None: ...
    def nonfinite(self) -> list[tuple[int, int]]: ...
