"""A step over several ranks: local tensors for the kernels, and one message between the ranks."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from fusedopt.core.checks import NonFiniteGradientError
from fusedopt.core.plan import Plan
from fusedopt.core.readings import Readings
from fusedopt.core.settings import NonFinite
from fusedopt.distributed import Exchange, LocalView, Ranks, is_dtensor
from fusedopt.reference import Group, StepOptions, distinct_params
from fusedopt.reference.limits import PerTensor, Unit


class RankStepper(Readings):
    """What a step needs beyond one process."""

    @abstractmethod
    def _step_options(self, mode: NonFinite) -> StepOptions: ...

    @abstractmethod
    def _step_anew(
        self, mode: NonFinite, control: Tensor, exchange: Exchange | None = None
    ) -> StepOptions: ...

    def _knows_ranks(self) -> bool:
        """Whether the user has said that each rank has parameters of its own."""
        own = self._own
        return own["process_group"] is not None and own["plain"] == "own"

    def _find_ranks(self) -> Ranks | None:
        """Who steps together, by the parameters as they are now."""
        own = self._own
        if own["plan"] is None:
            own["ranks"] = Ranks.of(own["param_groups"], own["process_group"], own["plain"])
        return own["ranks"]

    def _step_over_ranks(
        self,
        mode: NonFinite,
        plan: Plan | None,
        options: StepOptions,
        control: Tensor,
    ) -> StepOptions:
        """A step whose sum of squares and whose decision are those of all ranks.

        Raises:
            PeerError: another rank refused the step. Nothing has been changed.
        """
        ranks, view = self._own["ranks"], self._own["view"]
        exchange = Exchange(ranks, self._asked(mode), options.found_inf)
        options = options._replace(found_inf=exchange.found_inf)
        try:
            with exchange.joined():
                if not self._look():
                    plan = None
                exchange.counted = self._counted_chunks()
                if plan is None or not plan.step(
                    view.groups,
                    view.state,
                    *options.for_kernels(),
                    control=control,
                    exchange=exchange,
                ):
                    options = self._step_anew(mode, control, exchange)
        finally:
            view.end()
        return options

    @torch.no_grad()
    def _look(self) -> bool:
        """Looks at this rank's tensors. Returns whether they are those of the last look."""
        own = self._own
        if own["ranks"] is None:
            return True
        counters = self._provisional_state.counters
        return own["view"].look(own["param_groups"], own["state"], counters)

    def _seen(self) -> tuple[list[Group], dict[Tensor, Any], dict[Tensor, Tensor]]:
        """Groups, state and counters as a step sees them: of this rank's plain tensors."""
        if self._own["ranks"] is None:
            return self.param_groups, self.state, self._provisional_state.counters
        view: LocalView = self._own["view"]
        return view.groups, view.state, view.counters

    def _counted_chunks(self) -> list[Tensor]:
        ranks: Ranks = self._own["ranks"]
        counts = [ranks.counts(param, group) for group, param in distinct_params(self.param_groups)]
        return self._own["view"].counted_chunks(counts)

    def _asked(self, mode: NonFinite) -> str:
        """What all ranks must have been asked for alike, in words."""
        limit = self.max_grad_norm
        return f"{type(self).__name__}(max_grad_norm={limit}, nonfinite={mode!r})"

    def _check_layout(self, param: Any, name: str) -> None:
        """Refuses a DTensor that no step over ranks can take."""
        if not is_dtensor(param):
            return
        if any(placement.is_partial() for placement in param.placements):
            raise ValueError(
                f"{name} has placements {param.placements}; expected a parameter without Partial"
            )
        limit = self.max_grad_norm
        if isinstance(limit, PerTensor | Unit):
            raise ValueError(
                f"max_grad_norm={limit} needs the norm of {name}, of which each rank has a part "
                "only; expected a number, Percentile() or ZScore()"
            )

    def _nonfinite_error_over_ranks(self, names: list[str]) -> NonFiniteGradientError:
        """The same error on every rank, which names the parameters of all."""
        found = [(rank, name) for rank, its in self._own["ranks"].gather(names) for name in its]
        told = "; ".join(f"rank {rank}: {name}" for rank, name in found)
        return NonFiniteGradientError(list(dict.fromkeys(name for _, name in found)), told)
