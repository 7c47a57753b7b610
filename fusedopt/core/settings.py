"""The settings of an optimizer that may change between steps."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from fusedopt.core import check_settings, checks, sharding
from fusedopt.core.names import ParamNames
from fusedopt.core.nonfinite import NONFINITE_MODES, NonFinite, check_choice
from fusedopt.core.shared import Shared
from fusedopt.core.skip_limit import SkipLimit
from fusedopt.reference.groups import name_of
from fusedopt.reference.limits import AdaptiveClip, Unit

TORCHS = ("state", "param_groups", "defaults")  # checkpoints and users replace these
Plain = Literal["replicated", "own"]
MasterWeights = Literal["exact", "24bit"]
StateDtype = torch.dtype | Literal["8bit"]
Rounding = Literal["nearest", "stochastic"]


class ScalerValue(Shared[Tensor | None]):
    """A shared attribute that only takes a tensor of one number, or None."""

    def __set__(self, owner: Any, value: Any) -> None:
        if type(value) is int and value == 0 and owner._own["ranks"] is not None:
            # torch's scaler adds up the flags of its gradients, and this rank has none.
            value = torch.zeros(())
        super().__set__(owner, check_settings.check_scaler_value(self._name, value))


class ScalerFactor(ScalerValue):
    """A factor that torch's scaler multiplies by. Over several ranks it is missing until it is set.

    There torch's scaler calls `step` itself: it takes a missing factor for 1, and can't take None.
    """

    def __get__(self, owner: Any, owner_type: type) -> Any:
        value = super().__get__(owner, owner_type)
        if value is None and owner is not None and owner._own["ranks"] is not None:
            raise AttributeError(f"no scaler has set {self._name!r}")
        return value


class Settings(Optimizer):
    """Attributes that are checked when they are set."""

    _own: dict[str, Any]  # everything that may be set after construction: see `Shared`
    _lock: threading.RLock
    _names: ParamNames

    def _follow_names(self) -> None:
        """Makes the lists of names fit the lists of parameters."""
        self._names.follow(self.param_groups, self.state)

    if not TYPE_CHECKING:  # type checkers take them from torch's class
        state = Shared()
        param_groups = Shared()
        defaults = Shared()

    # A scaler sets these two during a step, each a tensor of one float32. The step divides the
    # gradients by grad_scale, and skips if found_inf is not zero.
    grad_scale = ScalerFactor(None)
    found_inf = ScalerValue(None)
    # Whether a scaler steps. Then an overflow skips, whatever `nonfinite` says: it is expected.
    skips_for_scaler = Shared[bool](False)

    @property
    def max_grad_norm(self) -> float | AdaptiveClip | None:
        """The largest global norm that is not clipped, a limit that adapts itself, or None."""
        return self._own["max_grad_norm"]

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | AdaptiveClip | None) -> None:
        value = check_settings.check_max_grad_norm(value)
        if isinstance(value, Unit) and hasattr(self, "param_groups"):
            self._follow_names()
            for index, group in enumerate(self.param_groups):
                for position, param in enumerate(group["params"]):
                    name = name_of(self.param_groups, index, position)
                    checks.check_rows(value, param, name)
        sharding.refuse(self._own["sharded"], *asks_for_norm(value, None))
        with self._lock:  # a step of another thread sees both changes or none
            if value != self._own.get("max_grad_norm"):
                self._own["clip_state"] = None  # a new limit starts empty
            if isinstance(value, AdaptiveClip):
                self._own["plan"] = None  # the next step checks whether it suits the parameters
            self._own["max_grad_norm"] = value

    @property
    def nonfinite(self) -> NonFinite | None:
        """The reaction to inf or nan in a gradient: "skip", "raise", "propagate", or None."""
        return self._own["nonfinite"]

    @nonfinite.setter
    def nonfinite(self, value: NonFinite | None) -> None:
        value = check_choice("nonfinite", value, NONFINITE_MODES)
        sharding.refuse(self._own["sharded"], *asks_for_norm(None, value))
        self._own["nonfinite"] = value

    @property
    def max_consecutive_skips(self) -> int | None:
        """How many steps in a row may be skipped before `step()` raises, or None."""
        limit: SkipLimit | None = self._own["skip_limit"]
        return None if limit is None else limit.limit

    @max_consecutive_skips.setter
    def max_consecutive_skips(self, value: int | None) -> None:
        limit = check_settings.check_count("max_consecutive_skips", value)
        self._own["skip_limit"] = None if limit is None else SkipLimit(limit)

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_"):
            check_settings.check_attribute(type(self), name, value)
        super().__setattr__(name, value)


def asks_for_norm(max_grad_norm: Any, nonfinite: Any) -> list[str]:
    """The settings, in words, that need the norm of the whole model."""
    limit = [] if max_grad_norm is None else [f"max_grad_norm={max_grad_norm}"]
    return limit + ([] if nonfinite in (None, "propagate") else [f"nonfinite={nonfinite!r}"])
