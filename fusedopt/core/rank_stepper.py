"""A step over several ranks: local tensors for the kernels, and one message between the ranks."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from fusedopt.core import sharding
from fusedopt.core.gathered_step import GatheredStep
from fusedopt.core.nonfinite import NonFinite, NonFiniteGradientError
from fusedopt.core.plan import Plan
from fusedopt.core.replicas import check_replicas
from fusedopt.core.scratch import with_scratch
from fusedopt.distributed import (
    Exchange,
    LocalView,
    Ranks,
    Share,
    announce,
    counted_chunks,
    find_ranks,
    first_element,
    has_dtensors,
    is_dtensor,
    local_of,
)
from fusedopt.reference import Group, StepOptions, distinct_params, is_clipped
from fusedopt.reference.groups import GROUP_SETTINGS
from fusedopt.reference.limits import PerTensor, Unit


class Common(Protocol):
    """What a step needs of a message: an `Exchange`, or one optimizer's part of it."""

    counted: list[Tensor]

    @property
    def found_inf(self) -> Tensor: ...

    def ask(self, found_inf: Tensor | None, is_sharded: bool) -> None: ...

    def __call__(self, messages: list[Tensor]) -> Tensor: ...


class RankStepper(GatheredStep):
    """What a step needs beyond one process."""

    @abstractmethod
    def _step_options(self, mode: NonFinite) -> StepOptions: ...

    @abstractmethod
    def _step_anew(
        self, mode: NonFinite, control: Tensor, exchange: Common | None = None
    ) -> StepOptions: ...

    @abstractmethod
    def _nonfinite_mode(self) -> NonFinite: ...

    def _knows_ranks(self) -> bool:
        """Whether the user has said that each rank has parameters of its own."""
        own = self._own
        return own["process_group"] is not None and own["plain"] == "own"

    def _find_ranks(self, asked: str) -> Ranks | None:
        """Who steps together, by the parameters as they are now. None: this rank alone."""
        own = self._own
        if own["share"] is not None:
            own["ranks"], own["is_sharded"] = own["share"].ranks, True
        elif own["plan"] is None:
            groups = own["param_groups"]
            own["ranks"] = find_ranks(groups, own["process_group"], own["plain"], asked)
            own["is_sharded"] = own["plain"] == "own" or has_dtensors(groups)
            if own["all_replicated"] and not own["is_sharded"]:
                own["ranks"] = None
        return own["ranks"]

    def _compare_replicas(self) -> None:
        """Once in `check_replicas` steps, compares gradients with the ranks that have copies."""
        own = self._own
        own["steps_until_check"] -= 1
        if own["steps_until_check"] > 0:
            return
        own["steps_until_check"] = own["check_replicas"]
        ranks = own["ranks"]
        if ranks is None and dist.is_available() and dist.is_initialized():
            ranks = Ranks(own["process_group"] or dist.group.WORLD, own["plain"])
        if ranks is not None and ranks.size > 1:
            check_replicas(own["param_groups"], ranks, own["plain"])

    def _step_over_ranks(
        self, mode: NonFinite, plan: Plan | None, control: Tensor, asked: str
    ) -> StepOptions:
        """A step whose sum of squares and whose decision are those of all ranks.

        Raises:
            PeerError: another rank refused the step, or is gone. Nothing has been changed. Or it
                refused the step before, which the host of a GPU hears now: that changed nothing.
        """
        own = self._own
        last, own["last_message"] = own["last_message"], None
        # The host waits where it is to decide something: who is sharded, and what is gathered.
        exchange = Exchange(own["ranks"], asked, waits=plan is None or own["share"] is not None)
        with exchange.joined():
            options = self._step_with(exchange, mode, plan, control)
        if not exchange.is_settled:
            own["last_message"] = exchange
        elif not exchange.is_sharded:  # the ranks have agreed on it: from now on each is alone
            own["all_replicated"] = True
            own["plan"] = None
        if last is not None:
            last.settle()
        return options

    def _step_with(
        self, exchange: Common, mode: NonFinite, plan: Plan | None, control: Tensor
    ) -> StepOptions:
        """A step that gets its sum of squares from a message."""
        try:
            if not self._look():
                plan = None
            self._take_grads()
            options = self._step_options(mode)
            exchange.ask(options.found_inf, self._own["is_sharded"])
            groups, states, _ = self._seen()
            exchange.counted = [] if plan is None else self._counted_chunks(plan)
            if plan is None or not plan.step(
                groups, states, *options.for_kernels(), control=control, exchange=exchange
            ):
                options = self._step_anew(mode, control, exchange)
            return options._replace(found_inf=exchange.found_inf)
        finally:
            self._own["view"].end()

    @torch.no_grad()
    def _look(self) -> bool:
        """Looks at this rank's tensors. Returns whether they are those of the last look."""
        own = self._own
        if own["ranks"] is None:
            return True
        counters = self._provisional_state.counters
        part_of = local_of if own["share"] is None else own["share"].part_of
        return own["view"].look(own["param_groups"], own["state"], counters, part_of)

    @torch.no_grad()
    def _take_grads(self) -> None:
        """Has the gradients on this rank's tensors, until the view's end."""
        if self._own["ranks"] is not None:
            self._own["view"].take_grads(self._own["param_groups"], announce)

    def _seen(self) -> tuple[list[Group], dict[Tensor, Any], dict[Tensor, Tensor]]:
        """Groups, state and counters as a step sees them: of this rank's plain tensors."""
        own = self._own
        seen = own["param_groups"], own["state"], self._provisional_state.counters
        if own["ranks"] is not None:
            view: LocalView = own["view"]
            seen = view.groups, view.state, view.counters
        if self.rule.scratch:
            return seen[0], with_scratch(self.rule, seen[1], own["scratch"]), seen[2]
        return seen

    def _first_elements(self) -> dict[Tensor, int]:
        """Where this rank's parts of DTensors begin in the whole tensors."""
        params = [param for group in self.param_groups for param in group["params"]]
        return {local_of(it): first_element(it) or 0 for it in params if is_dtensor(it)}

    def _counted_chunks(self, plan: Plan | None) -> list[Tensor]:
        """By device, which chunks this rank counts; as long as a plan fits, the same ones."""
        own = self._own
        flags = [[*map(group.get, GROUP_SETTINGS)] for group in own["param_groups"]]
        known = own["counted"]
        if plan is None or known is None or known[0] is not plan or known[1] != flags:
            own["counted"] = known = plan, flags, self._count_chunks()
        return known[2]

    def _count_chunks(self) -> list[Tensor]:
        ranks: Ranks | None = self._own["ranks"]
        counts = [
            is_clipped(group)
            and (group.get("counted", True) if ranks is None else ranks.counts(param, group))
            for group, param in distinct_params(self.param_groups)
        ]
        params = [param for _, param in distinct_params(self._seen()[0])]
        return counted_chunks(params, counts)

    def _asked(self, mode: NonFinite) -> str:
        """What all ranks must have been asked for alike, in words."""
        return f"{type(self).__name__}({self._asked_settings(mode)})"

    def _asked_settings(self, mode: NonFinite | None = None) -> str:
        own = self._own
        mode = mode or self._nonfinite_mode()
        return (
            f"max_grad_norm={own['max_grad_norm']}, nonfinite={mode!r}, plain={own['plain']!r}, "
            f"max_consecutive_skips={self.max_consecutive_skips}, "
            f"check_replicas={own['check_replicas']}{self._dealt()}{self._learned()}"
        )

    def _check_layout(self, param: Any, name: str) -> None:
        """Refuses a DTensor that no step over ranks can take, and what no rank has the state of."""
        share: Share | None = self._own["share"]
        if share is not None and param not in share.owners:
            raise ValueError(
                f"{name} came after shard_states(); expected only parameters that were dealt to "
                "ranks then: add all of them before it"
            )
        limit = self.max_grad_norm
        is_part = is_dtensor(param) or sharding.is_flat_part(param)
        if is_part and isinstance(limit, PerTensor | Unit):
            raise ValueError(
                f"max_grad_norm={limit} needs the norm of {name}, of which each rank has a part "
                "only; expected a number, Percentile() or ZScore()"
            )
        if self.rule.trust is not None and sharding.is_part(param):
            raise ValueError(
                f"{type(self).__name__} (rule {self.rule.name}) needs a sum over all of {name}, of "
                "which each rank has a part only; expected whole parameters: "
                "DistributedDataParallel, with shard_states() for the states"
            )
        if not is_dtensor(param):
            return
        if any(placement.is_partial() for placement in param.placements):
            raise ValueError(
                f"{name} has placements {param.placements}; expected a parameter without Partial"
            )

    def _nonfinite_error_over_ranks(self, names: list[str]) -> NonFiniteGradientError:
        """The same error on every rank, which names the parameters of all."""
        found = [(rank, name) for rank, its in self._own["ranks"].gather(names) for name in its]
        told = "; ".join(f"rank {rank}: {name}" for rank, name in found)
        return NonFiniteGradientError(list(dict.fromkeys(name for _, name in found)), told)
