"""Several optimizers that step as one: one norm, one decision, one message."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack

from torch import Tensor

from fusedopt.core.nonfinite import NonFiniteGradientError
from fusedopt.core.optimizer import FusedOptimizer
from fusedopt.distributed import Exchange, Ranks, find_ranks


def step_together(optimizers: Iterable[FusedOptimizer]) -> None:
    """Steps several optimizers with the norm of all their gradients, or skips in all of them.

    For parts of a model that take different rules, or the chunks of a pipeline on one rank. It
    replaces their `step()`; their hooks and schedulers see a step of each. They need the same
    `max_grad_norm`, `nonfinite`, `process_group` and `plain`. With a scaler, call
    `scaler.unscale_` for each of them before.

    Over several ranks, every rank calls it with its own optimizers, and one message is exchanged.

    Args:
        optimizers: of this rank, each once, in the same order at every call.

    Raises:
        TypeError, ValueError: there is none, one is no fused optimizer or is listed twice, or their
            settings differ. Nothing has been changed then.
        NonFiniteGradientError: gradients held inf or nan, with `nonfinite="raise"`; it names the
            parameters of all optimizers.
        TooManySkipsError, PeerError: as `step()` of one optimizer.
    """
    optimizers = _checked(optimizers)
    with ExitStack() as stack:
        for it in optimizers:
            stack.enter_context(it._lock)
        exchange = Exchange(_ranks_of(optimizers), optimizers[0]._asked_settings())
        exchange.is_sharded = True
        parts = [Part(exchange, it) for it in optimizers]
        for part, following in zip(parts, [*parts[1:], None], strict=True):
            part.following = following
            stack.enter_context(part)
        with exchange.joined():
            _check_settings(optimizers)
            parts[0].optimizer.step()
    _raise_all([part.end for part in parts])


class Part:
    """One optimizer's part of a common message.

    It is what that optimizer's step has as its exchange. It collects this rank's messages, lets the
    next optimizer measure and step, and returns the total.
    """

    def __init__(self, exchange: Exchange, optimizer: FusedOptimizer) -> None:
        self.counted: list[Tensor] = []
        self.optimizer = optimizer
        self.following: Part | None = None
        self.end: Callable[[], None] = lambda: None  # what is left to do after all have stepped
        self.total: Tensor | None = None
        self._exchange = exchange

    @property
    def found_inf(self) -> Tensor:
        return self._exchange.found_inf

    def ask(self, found_inf: Tensor | None, is_sharded: bool) -> None:
        self._exchange.ask(found_inf, is_sharded)

    def __call__(self, messages: list[Tensor]) -> Tensor:
        self._exchange.collect(messages)
        if self.following is None:
            self.total = self._exchange.total()
        else:
            self.following.optimizer.step()
            self.total = self.following.total
        assert self.total is not None
        return self.total

    def __enter__(self) -> None:
        self.optimizer._own["part"] = self

    def __exit__(self, *_: object) -> None:
        self.optimizer._own["part"] = None


def _checked(optimizers: Iterable[FusedOptimizer]) -> list[FusedOptimizer]:
    found = list(optimizers)
    for index, it in enumerate(found):
        if not isinstance(it, FusedOptimizer):
            raise TypeError(
                f"step_together was given a {type(it).__name__} at index {index}; expected fused "
                "optimizers"
            )
    if not found or len({id(it) for it in found}) < len(found):
        raise ValueError(
            f"step_together was given {len(found)} optimizers"
            f"{', one of them twice' if found else ''}; expected one or more, each once"
        )
    return found


def _ranks_of(optimizers: list[FusedOptimizer]) -> Ranks | None:
    """The ranks of all optimizers' parameters. They are looked for where a plan is made anew."""
    first, key = optimizers[0]._own, tuple(map(id, optimizers))
    known = first["together"]
    have_plans = all(it._own["plan"] is not None for it in optimizers)
    if known is not None and known[0] == key and have_plans:
        return known[1]
    groups = [group for it in optimizers for group in it.param_groups]
    if first["share"] is not None:
        ranks = first["share"].ranks
    else:
        ranks = find_ranks(groups, first["process_group"], first["plain"], "step_together")
    first["together"] = key, ranks
    for it in optimizers:
        it._own["ranks"], it._own["plan"] = ranks, None
    return ranks


def _check_settings(optimizers: list[FusedOptimizer]) -> None:
    first = optimizers[0]
    for it in optimizers[1:]:
        own, same = it._own["process_group"], first._own["process_group"]
        if it._asked_settings() != first._asked_settings() or own is not same:
            raise ValueError(
                f"step_together was given a {type(first).__name__} with "
                f"{first._asked_settings()} and a {type(it).__name__} with {it._asked_settings()}; "
                "expected the same settings and the same process_group"
            )


def _raise_all(ends: list[Callable[[], None]]) -> None:
    """Raises what the optimizers have to say of the step: all names of parameters in one error."""
    errors: list[RuntimeError] = []
    for end in ends:
        try:
            end()
        except RuntimeError as error:
            errors.append(error)
    found = [it for it in errors if isinstance(it, NonFiniteGradientError)]
    if found:
        names = [name for it in found for name in it.names]
        described = "; ".join(it.description for it in found if it.names)
        raise NonFiniteGradientError(names, described)
    if errors:
        raise errors[0]
