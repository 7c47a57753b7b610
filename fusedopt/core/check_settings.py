"""Checks an optimizer's own settings: `max_grad_norm`, `nonfinite`, `telemetry` and so on."""

from __future__ import annotations

import difflib
import math
import numbers
from typing import Any

from torch import Tensor

from fusedopt.distributed.ranks import PLAIN
from fusedopt.reference.formats import FORMAT_OPTIONS
from fusedopt.reference.limits import LIMITS, AdaptiveClip

BACKENDS = ("cuda", "cpu", "reference")
OURS = (
    *("max_grad_norm", "nonfinite", "backend", "telemetry", "max_consecutive_skips"),
    *("process_group", "plain", "check_replicas"),
)
MAX_TELEMETRY = 2**31 - 1


def check_max_grad_norm(value: Any) -> float | AdaptiveClip | None:
    if value is None or type(value) in LIMITS:
        return value
    expected = "expected a float > 0, one of fusedopt.clip's limits, or None"
    if isinstance(value, type) and issubclass(value, AdaptiveClip):
        raise TypeError(f"max_grad_norm is the class {value.__name__} itself; {expected}")
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"max_grad_norm is a {type(value).__name__}; {expected}")
    if math.isnan(value) or value <= 0:
        raise ValueError(f"Invalid max_grad_norm value: {value}; {expected}")
    return float(value)


def check_scaler_value(name: str, value: Any) -> Tensor | None:
    """Refuses what a step can't read as one number: `grad_scale` and `found_inf` are tensors."""
    if value is None:
        return value
    expected = "expected a tensor of one real number, as torch.amp.GradScaler sets it, or None"
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; {expected}")
    if value.numel() != 1:
        raise ValueError(f"{name} has the shape {tuple(value.shape)}; {expected}")
    if value.is_complex():
        raise TypeError(f"{name} is {value.dtype}; {expected}")
    if value.is_meta:
        raise ValueError(f"{name} is on the meta device and has no value; {expected}")
    return value


def check_count(name: str, value: Any) -> int | None:
    """Refuses a value that is neither a whole number above 0 nor None."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} is a {type(value).__name__}; expected an int > 0 or None")
    if value <= 0:
        raise ValueError(f"Invalid {name} value: {value}; expected an int > 0 or None")
    return int(value)


def check_telemetry(value: Any) -> int | None:
    value = check_count("telemetry", value)
    if value is not None and value > MAX_TELEMETRY:
        raise ValueError(
            f"Invalid telemetry value: {value}; expected the number of steps to keep, up to "
            f"{MAX_TELEMETRY}"
        )
    return value


def check_attribute(owner: type, name: str, value: Any) -> None:
    """Refuses to set an attribute without effect, such as a misspelled setting."""
    if name in FORMAT_OPTIONS:
        raise AttributeError(
            f"{name} is an argument of {owner.__name__}, and can't be set later; expected it in a "
            "param group"
        )
    if name in ("backend", "process_group", "plain", "check_replicas") or (
        name == "telemetry" and not callable(value)
    ):
        raise AttributeError(f"{name} is an argument of {owner.__name__}, and can't be set later")
    if hasattr(owner, name):
        return
    close = difflib.get_close_matches(name, (*OURS, *FORMAT_OPTIONS), 1, cutoff=0.8)
    if close:
        raise AttributeError(f"{owner.__name__} has no {name}; did you mean {close[0]}?")


def check_plain(value: Any) -> str:
    if value not in PLAIN:
        raise ValueError(f"Invalid plain value: {value!r}; expected 'replicated' or 'own'")
    return value
