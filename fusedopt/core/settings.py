"""What can be set between steps."""

from __future__ import annotations

import threading
from typing import Any, Literal

from torch.optim import Optimizer

from fusedopt.core import checks
from fusedopt.core.names import ParamNames
from fusedopt.core.skip_limit import SkipLimit
from fusedopt.reference.groups import name_of
from fusedopt.reference.limits import AdaptiveClip, Unit

NonFinite = Literal["skip", "raise", "propagate"]


class Settings(Optimizer):
    """Attributes that are checked when they are set."""

    # What can be set after construction lies in a dict: the wrapper that a trainer makes, of a
    # class derived from ours and delegating what it lacks, then writes here and not to itself.
    _own: dict[str, Any]
    _lock: threading.RLock
    _names: ParamNames

    def _follow_names(self) -> None:
        """Brings the lists of names in line with those of the parameters, however these changed."""
        self._names.follow(self.param_groups, self.state)

    @property
    def max_grad_norm(self) -> float | AdaptiveClip | None:
        """The largest global norm that is not clipped, a limit that adapts itself, or None."""
        return self._own["max_grad_norm"]

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | AdaptiveClip | None) -> None:
        value = checks.check_max_grad_norm(value)
        if isinstance(value, Unit) and hasattr(self, "param_groups"):
            self._follow_names()
            for index, group in enumerate(self.param_groups):
                for position, param in enumerate(group["params"]):
                    name = name_of(self.param_groups, index, position)
                    checks.check_rows(value, param, name)
        with self._lock:  # a step of another thread has the one or the other
            if value != self._own.get("max_grad_norm"):
                self._own["clip_state"] = None  # another limit learns anew
            self._own["max_grad_norm"] = value

    @property
    def nonfinite(self) -> NonFinite | None:
        """What a gradient with inf or nan does: "skip", "raise", "propagate", or None."""
        return self._own["nonfinite"]

    @nonfinite.setter
    def nonfinite(self, value: NonFinite | None) -> None:
        self._own["nonfinite"] = checks.check_choice("nonfinite", value, checks.NONFINITE_MODES)

    @property
    def max_consecutive_skips(self) -> int | None:
        """How many steps in a row may be skipped before `step()` raises, or None."""
        limit: SkipLimit | None = self._own["skip_limit"]
        return None if limit is None else limit.limit

    @max_consecutive_skips.setter
    def max_consecutive_skips(self, value: int | None) -> None:
        limit = checks.check_count("max_consecutive_skips", value)
        self._own["skip_limit"] = None if limit is None else SkipLimit(limit)
