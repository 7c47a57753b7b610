"""Ends a run in which too many steps in a row are skipped."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedopt.reference import Control


class TooManySkipsError(RuntimeError):
    """`max_consecutive_skips` steps in a row were skipped. None of them changed anything."""


class SkipLimit:
    """Looks at the number of steps skipped in a row, without waiting for a device.

    On CUDA each step starts a copy of the number to the host. The first later step that finds the
    copy finished reads it, so that the limit is noticed a few steps late.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._copy: Tensor | None = None
        self._event: torch.Event | None = None

    def exceeded(self, control: Tensor) -> bool:
        """Whether the limit is known to be reached. Call it after each step."""
        skips = control[Control.CONSECUTIVE_SKIPS]
        if not control.is_cuda:
            return skips.item() >= self.limit
        if torch.cuda.is_current_stream_capturing():
            return False
        if self._copy is None:
            self._copy = torch.zeros((), dtype=torch.float64, pin_memory=True)
        if self._event is not None:
            if not self._event.query():
                return False
            if self._copy.item() >= self.limit:
                self._event = None
                return True
        self._copy.copy_(skips, non_blocking=True)
        self._event = torch.cuda.current_stream(control.device).record_event()
        return False

    def __deepcopy__(self, memo: dict[int, object]) -> SkipLimit:
        return SkipLimit(self.limit)

    def __reduce__(self) -> tuple[type[SkipLimit], tuple[int]]:
        return SkipLimit, (self.limit,)
