"""The end of a step whose states are dealt over ranks: all get what the others have updated."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedopt.core.learned_limit import LearnedLimit
from fusedopt.distributed import Share
from fusedopt.reference import Control, distinct_params
from fusedopt.reference.limits import AdaptiveClip
from fusedopt.telemetry import STEP_COLUMNS


class GatheredStep(LearnedLimit):
    """What `shard_states` adds to a step."""

    @torch.no_grad()
    def _gather(self, control: Tensor) -> None:
        """Gets the other ranks' parameters. After a skip there are none, if the host knows of it.

        Raises:
            PeerError: a rank was lost meanwhile.
        """
        share: Share = self._own["share"]
        if control.device.type == "cpu" and control[Control.STEP_SKIPPED]:
            return
        share.gather(param for _, param in distinct_params(self.param_groups))
        limit = self.max_grad_norm
        if isinstance(limit, AdaptiveClip) and limit.part is not None:
            self._gather_limits(share, control)

    def _gather_limits(self, share: Share, control: Tensor) -> None:
        """What limits of single tensors have learned, and the smallest coefficient of all ranks."""
        params = [param for _, param in distinct_params(self.param_groups)]
        state: Tensor = self._own["clip_state"]
        learned = state[: len(params)].clone()
        away = [not share.keeps(param) for param in params[: len(learned)]]
        learned[torch.tensor(away, dtype=torch.bool, device=state.device)] = torch.inf
        smallest, learned = share.least([control[Control.CLIP_COEF], learned])
        state[: len(params)] = learned
        control[Control.CLIP_COEF] = smallest
        if self._rings is not None:
            ring = self._rings.steps
            row = (control[Control.STEPS] - 1).remainder(len(ring)).long().reshape(1)
            column = STEP_COLUMNS.index("clip_coef")
            ring[:, column].index_copy_(0, row, smallest.reshape(1))

    def _dealt(self) -> str:
        """What all ranks must have dealt alike, in words."""
        share: Share | None = self._own["share"]
        return "" if share is None else f", states sharded over {share.size} ranks"
