"""The statistics of an adaptive limit, and the parameters that they belong to."""

from __future__ import annotations

import operator
import zlib

import torch
from torch import Tensor

from fusedopt import reference
from fusedopt.core import checks
from fusedopt.core.readings import Readings
from fusedopt.reference.limits import AdaptiveClip


class LearnedLimit(Readings):
    """The state of the limit that is `max_grad_norm`, if it is one that adapts itself."""

    @torch.inference_mode(False)
    def _clip_state(self, clip: AdaptiveClip) -> Tensor:
        """The state of an adaptive limit, on the first parameter's device."""
        device = self._readings().device
        num_params = sum(len(group["params"]) for group in self.param_groups)
        before = self._own["clip_state"]
        clip_state = clip.resize(before, num_params, device)
        if clip_state is not before and clip_state.numel() > 0:
            checks.check_new_state(str(clip), "a step with this max_grad_norm")
        self._own["clip_state"] = clip_state
        return clip_state

    def _move_clip_state(self) -> None:
        """Reorders the state of a limit if parameters have changed places."""
        limit, clip_state = self.max_grad_norm, self._own["clip_state"]
        before = self._own["clip_params"]
        params = [param for _, param in reference.distinct_params(self.param_groups)]
        if isinstance(limit, AdaptiveClip) and clip_state is not None and before is not None:
            same = len(before) == len(params) and all(map(operator.is_, before, params))
            if not same:
                self._own["clip_state"] = limit.reorder(clip_state, before, params)
        self._own["clip_params"] = params

    def _learned(self) -> str:
        """A checksum of what a limit of the common norm has learned, in words."""
        limit, state = self.max_grad_norm, self._own["clip_state"]
        if not isinstance(limit, AdaptiveClip) or limit.part is not None or state is None:
            return ""
        if state.device.type != "cpu":  # to read it would wait at every step
            return ""
        if state.numel() == 0 or state[0] == 0:  # no step yet
            return ""
        checksum = zlib.crc32(repr(state.tolist()).encode())
        return f", a limit that has learned from {int(state[0])} steps ({checksum:08x})"
