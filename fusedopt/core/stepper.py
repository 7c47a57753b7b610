"""One step: by the plan if nothing has moved, else everything is checked and planned anew."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from fusedopt import reference
from fusedopt.core import backends, check_formats, checks, sharding, state
from fusedopt.core.nonfinite import NonFinite, NonFiniteGradientError, mode_of
from fusedopt.core.plan import Plan
from fusedopt.core.rank_stepper import Common, RankStepper
from fusedopt.core.settings import asks_for_norm
from fusedopt.core.skip_limit import SkipLimit, TooManySkipsError
from fusedopt.distributed import local_of
from fusedopt.reference import Control, StepOptions, norms
from fusedopt.reference.formats import set_formats
from fusedopt.reference.groups import name_of
from fusedopt.reference.limits import AdaptiveClip
from fusedopt.telemetry import PARAM_COLUMNS, STEP_COLUMNS, explain


class Stepper(RankStepper):
    """The step of every optimizer, without torch's protocol around it."""

    _backend: str | None

    def _fused_step(self) -> None:
        own = self._own
        mode = self._nonfinite_mode()
        control = self._readings()
        plan = own["plan"]
        if [*map(tuple, own["param_groups"])] != own["group_keys"]:
            plan = None  # a group has a new key, which may be one of ours
        if own["seen_formats"] and own["seen_formats"] != set_formats(own["param_groups"]):
            plan = None
        part = own["part"]
        if part is None and own["was_part"]:
            plan = own["plan"] = None  # its ranks were those of several optimizers
        own["was_part"] = part is not None
        if part is not None:  # of a step with other optimizers, after which the rest is done
            if own["check_replicas"] is not None:
                self._compare_replicas()
            options = self._step_with(part, mode, plan, control)
            part.end = partial(self._end_step, mode, options, control)
            return
        if plan is None:
            self._find_ranks(self._asked(mode))
        if own["check_replicas"] is not None:
            self._compare_replicas()
        if own["ranks"] is not None:
            options = self._step_over_ranks(mode, plan, control, self._asked(mode))
        else:
            options = self._step_alone(mode, plan, control)
        self._end_step(mode, options, control)

    def _end_step(self, mode: NonFinite, options: StepOptions, control: Tensor) -> None:
        """Gathers what other ranks have updated. Raises what a skipped step is to raise."""
        own = self._own
        if own["share"] is not None:
            self._gather(control)
        if mode == "raise" and self._met_nonfinite(options, control):
            raise self._nonfinite_error()
        limit: SkipLimit | None = own["skip_limit"]
        if limit is not None and limit.exceeded(control):
            raise TooManySkipsError(
                f"{limit.limit} steps in a row were skipped (max_consecutive_skips): "
                f"{self.explain()}"
            )

    def _step_alone(self, mode: NonFinite, plan: Plan | None, control: Tensor) -> StepOptions:
        own = self._own
        options = self._step_options(mode)
        states = own["state"] if not self.rule.scratch else self._seen()[1]
        if plan is not None and plan.step(
            own["param_groups"], states, *options.for_kernels(), control=control
        ):
            return options
        return self._step_anew(mode, control)

    def _nonfinite_mode(self) -> NonFinite:
        own = self._own
        if own["skips_for_scaler"]:
            return "skip"
        return mode_of(own["nonfinite"], own["max_grad_norm"])

    def _step_options(self, mode: NonFinite) -> StepOptions:
        """The options of this step. A scaler sets `grad_scale` and `found_inf`, as torch's does."""
        own = self._own
        grad_scale, found_inf, limit = own["grad_scale"], own["found_inf"], own["max_grad_norm"]
        scaled = grad_scale is not None or found_inf is not None
        measure = limit is not None or mode != "propagate" or scaled
        clip = None
        if isinstance(limit, AdaptiveClip):
            limit, clip = limit.max_norm, (limit, self._clip_state(limit))
        return StepOptions(
            max_grad_norm=math.inf if limit is None else limit,
            measure=measure,
            skip_nonfinite=mode != "propagate",
            grad_scale=grad_scale,
            found_inf=found_inf,
            clip=clip,
        )

    def _step_anew(
        self, mode: NonFinite, control: Tensor, exchange: Common | None = None
    ) -> StepOptions:
        """A step by a new plan, or by the reference. Returns the options that it took."""
        plan, new_states = self._prepare()
        self._plan = plan
        options = self._step_options(mode)  # a limit's state may have moved
        groups, states, counters = self._seen()
        if exchange is not None:
            exchange.counted = self._counted_chunks(plan)
        try:
            if plan is None:
                first, rings = self._first_elements(), self._rings
                reference.step(
                    *(self.rule, groups, states, counters, options, control, rings),
                    exchange,
                    first,
                )
            elif not plan.step(
                groups, states, *options.for_kernels(), control=control, exchange=exchange
            ):
                raise RuntimeError("fusedopt: a new plan doesn't fit its parameters; please report")
        except BaseException:  # of a refusal, by another rank as well
            self._drop_state(new_states)
            raise
        if new_states:
            self._settle(new_states, mode, control)
        return options

    def _settle(self, new_states: list[Tensor], mode: NonFinite, control: Tensor) -> None:
        """Drops state that was made for a skipped step, now or as soon as the host knows."""
        host_knows = mode == "raise" or control.device.type == "cpu"
        if not host_knows:
            self._provisional_state.add(new_states)
        elif control[Control.STEP_SKIPPED]:
            self._drop_state(new_states)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _prepare(self) -> tuple[Plan | None, list[Tensor]]:
        """Checks everything, then makes what is missing.

        Returns:
            A plan (None: the reference runs), and the parameters whose state is new.
        """
        self._check_all()
        counters = self._provisional_state.counters
        params = (p for group in self.param_groups for p in group["params"] if not p.is_meta)
        devices = (param.device for param in params)
        backend = backends.choose(self._backend, devices, self._only_exact())
        for group in self.param_groups:
            checks.normalize_options(self.rule, group)
        rings = self._make_rings()
        new_states = [
            param
            for group in self.param_groups
            for param in group["params"]
            if self._keeps(param) and state.complete(self.rule, group, param, self.state, counters)
        ]
        self._move_clip_state()
        self._own["group_keys"] = [*map(tuple, self.param_groups)]
        self._own["seen_formats"] = set_formats(self.param_groups)
        try:
            self._look()
            groups, states, counters = self._seen()
            if not any(group["params"] for group in groups):
                backend = backends.REFERENCE  # no kernel would write the readings of other ranks
            first = self._first_elements()
            plan = backends.new_plan(backend, self.rule, groups, states, counters, rings, first)
            checks.check_shared_memory(plan, self.param_groups)
        except Exception:
            self._drop_state(new_states)
            raise
        return plan, new_states

    def _only_exact(self) -> str | None:
        """A setting, in words, that torch's own functions can't serve. None: there is none."""
        limit = self.max_grad_norm
        if self._own["ranks"] is not None or self._own["part"] is not None:
            return "steps over several ranks or with several optimizers"
        if isinstance(limit, AdaptiveClip):
            return f"max_grad_norm={limit}"
        if not all(it.are_default for it in set_formats(self.param_groups)):
            return "master_weights, state_dtype or rounding"
        return None if self._rings is None else f"telemetry={self._rings.size}"

    def _make_rings(self) -> list[Tensor]:
        """The rings of telemetry, in the kernels' order; an empty list without telemetry."""
        rings = self._rings
        if rings is None:
            return []
        try:
            rings.resize(self.param_groups)
        except RuntimeError as error:
            params = sum(1 for _ in reference.distinct_params(self.param_groups))
            columns = len(PARAM_COLUMNS) * params + len(STEP_COLUMNS) + len(self.param_groups)
            raise RuntimeError(
                f"telemetry={rings.size} keeps {8 * columns * rings.size:,} bytes for {params} "
                "parameters, and there is no memory for them; expected a smaller number of steps"
            ) from error
        return rings.tensors()

    def _check_all(self) -> None:
        """Refuses by name all groups, parameters, gradients and states that no step can take."""
        self._follow_names()
        groups, states, _ = self._seen()
        for index, group in enumerate(groups):
            self._check_group(index)
            checks.check_ranges(f"param group {index}: ", self.rule, group, self.defaults)
            for position, param in enumerate(group["params"]):
                name = name_of(self.param_groups, index, position)
                if param.grad is None:  # its state is left alone
                    continue
                checks.check_grad(param, param.grad, name)
                if not state.is_new(states.get(param)):
                    checks.check_state(self.rule, group, param, states[param], name)
                    checks.check_state_dtypes(self.rule, group, param, states[param], name)
                elif state.names_of(self.rule, group, param):
                    checks.check_new_state(name, "a step with its gradient")

    def _check_group(self, index: int) -> None:
        own, group = self._own, self.param_groups[index]
        checks.check_options(self.rule, index, group, self.defaults, self._settings())
        for position, param in enumerate(group["params"]):
            name = name_of(self.param_groups, index, position)
            self._check_layout(param, name)
            checks.check_param(local_of(param), name, self._backend)
            check_formats.check_param_formats(group, param, name)
            checks.check_rows(self.max_grad_norm, local_of(param), name)
            if self._knows_ranks():
                continue
            own["sharded"] = own["sharded"] or sharding.sharded_param(param, name)
        sharding.refuse(own["sharded"], *asks_for_norm(own["max_grad_norm"], own["nonfinite"]))

    def _drop_state(self, params: list[Tensor]) -> None:
        if params:
            self._plan = None
        self._provisional_state.drop(params, self.state)

    @staticmethod
    def _met_nonfinite(options: StepOptions, control: Tensor) -> bool:
        """Whether inf or nan in the gradients skipped the step, and not a scaler."""
        finite = math.isfinite(control[Control.SUM_OF_SQUARES].item())
        return not finite and not options.asks_for_skip()

    def _nonfinite_error(self) -> NonFiniteGradientError:
        self._take_grads()
        places = self._nonfinite_places()
        self._own["view"].end()
        names = [name_of(self.param_groups, g, i) for g, i in places]
        if self._own["ranks"] is not None:
            return self._nonfinite_error_over_ranks(names)
        grads = [list(self.param_groups[g]["params"])[i].grad for g, i in places]
        if self._rings is not None:
            return NonFiniteGradientError(names, explain.last_step(self.telemetry()))
        return NonFiniteGradientError(names, explain.describe_grads(names, grads))

    def _nonfinite_places(self) -> list[tuple[int, int]]:
        """(group, index in the group) of the parameters whose gradients hold inf or nan."""
        if self._plan is not None:
            return self._plan.nonfinite()
        return [
            (g, i)
            for g, group in enumerate(self._seen()[0])
            for i, param in enumerate(group["params"])
            if param.grad is not None and not norms.chunk_sums(param, param.grad).isfinite().all()
        ]
