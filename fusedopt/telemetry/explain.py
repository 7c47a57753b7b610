"""Telemetry in words: which parameters' gradients made a step skip, or clip."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedopt.reference import Control
from fusedopt.telemetry.rows import ParamTelemetry, Telemetry

NO_STEP = "no step has been taken yet"
NO_STEP_SINCE = "no step has been taken since a checkpoint of step {} was loaded"
NAMED = 3  # the number of parameters that are named; the others are counted
LOOK_BACK = 20  # the number of steps over which a norm's growth is measured
WORTH_TELLING = 2.0  # smaller growth of a norm is not mentioned


def explain(telemetry: Telemetry, part: str | None) -> str:
    """Says whether the last step was clipped or skipped and why, and sums up the steps before it.

    Args:
        part: the limit's `part`: "parameter", "row" or None; see `AdaptiveClip`.
    """
    count = len(telemetry.step)
    if count == 0:
        return NO_STEP
    lines = [describe_step(telemetry, count - 1, part)]
    skipped = telemetry.skipped.nonzero().flatten().tolist()
    if skipped and skipped[-1] != count - 1:
        lines.append("before that, " + describe_step(telemetry, skipped[-1]))
    if count > 1:
        clipped = int((~telemetry.skipped & (telemetry.clip_coef < 1)).sum())
        lines.append(f"of the last {count} steps {len(skipped)} were skipped, {clipped} clipped")
    return "\n".join(lines)


def last_step(telemetry: Telemetry) -> str:
    """Describes the last step alone."""
    return describe_step(telemetry, len(telemetry.step) - 1)


def explain_without_telemetry(control: Tensor, part: str | None) -> str:
    """Describes the last step by its readings alone; see `Control`."""
    readings = control.tolist()
    steps, norm, coef = (readings[i] for i in (Control.STEPS, Control.GRAD_NORM, Control.CLIP_COEF))
    if steps == 0:
        return NO_STEP
    if readings[Control.STEP_SKIPPED]:
        what = "skipped; an optimizer made with telemetry=N would know which parameter it was"
    else:
        what = f"gradient norm {norm:.3g}, {_clipped(coef, part)}"
    return f"step {steps:.0f}: {what}\n{readings[Control.SKIPPED_STEPS]:.0f} were skipped so far"


def describe_grads(names: list[str], grads: list[Tensor]) -> str:
    """How many inf and nan these parameters' gradients hold."""
    words = [
        f"{name}, {count_nonfinite(int(g.isinf().sum()), int(g.isnan().sum()), g.numel())}"
        for name, g in zip(names[:NAMED], grads)
    ]
    return "; ".join(words) + and_more(len(names) - NAMED)


def describe_step(telemetry: Telemetry, row: int, part: str | None = None) -> str:
    """Describes one step, from its row."""
    head = f"step {int(telemetry.step[row])}"
    norm, coef = telemetry.grad_norm[row].item(), telemetry.clip_coef[row].item()
    if telemetry.skipped[row]:
        return f"{head} skipped: {describe_nonfinite(telemetry, row)}"
    broken = nonfinite_params(telemetry, row)
    if broken:
        return f"{head} updated in spite of {describe_nonfinite(telemetry, row)}"
    return f"{head}: gradient norm {norm:.3g}, {_clipped(coef, part)}{_largest(telemetry, row)}"


def nonfinite_params(telemetry: Telemetry, row: int) -> list[str]:
    """The parameters whose gradients held inf or nan in that step."""
    return [
        name
        for name, param in telemetry.params.items()
        if param.infs[row] > 0 or param.nans[row] > 0
    ]


def describe_nonfinite(telemetry: Telemetry, row: int) -> str:
    """The parameters whose gradients held inf or nan, how many, and the growth before."""
    names = nonfinite_params(telemetry, row)
    if not names:
        if telemetry.grad_norm[row].isfinite():
            return "no gradient holds inf or nan; a scaler asked for it (found_inf)"
        if any(param.grad_norm[row].isinf() for param in telemetry.params.values()):
            return "no gradient holds inf or nan, but their squares overflow"
        return "gradients of another rank hold inf or nan"
    words = []
    for name in names[:NAMED]:
        param = telemetry.params[name]
        infs, nans = int(param.infs[row]), int(param.nans[row])
        words.append(f"{name}, {count_nonfinite(infs, nans, param.numel)}{_growth(param, row)}")
    return "; ".join(words) + and_more(len(names) - NAMED)


def count_nonfinite(infs: int, nans: int, numel: int) -> str:
    """Words such as "3 inf and 1 nan of 4.2M"."""
    found = [f"{count:,} {what}" for count, what in ((infs, "inf"), (nans, "nan")) if count]
    return f"{' and '.join(found) or 'none'} of {short(numel)}"


def and_more(count: int) -> str:
    return f"; and {count} more" if count > 0 else ""


def short(count: int) -> str:
    """A number in at most three digits and a letter, once it has more than four digits."""
    for exponent, letter in ((9, "G"), (6, "M"), (3, "k")):
        if count >= 10 * 10**3 and count >= 10**exponent:
            return f"{count / 10**exponent:.3g}{letter}"
    return str(count)


def _clipped(coef: float, part: str | None) -> str:
    if not coef < 1:
        return "not clipped"
    return f"clipped by {coef:.3g}" if part is None else f"the most clipped {part} by {coef:.3g}"


def _growth(param: ParamTelemetry, row: int) -> str:
    """The growth of a gradient's norm until the step before, if it had grown."""
    first = max(0, row - LOOK_BACK)
    norms = param.grad_norm[first:row]
    steps = torch.arange(first, row)[norms.isfinite() & (norms > 0)]
    if len(steps) < 2:
        return ""
    factor = (param.grad_norm[steps[-1]] / param.grad_norm[steps[0]]).item()
    if factor < WORTH_TELLING:
        return ""
    return f"; its norm had grown {factor:,.3g}-fold over the last {int(row - steps[0])} steps"


def _largest(telemetry: Telemetry, row: int) -> str:
    """The parameter whose gradient is the largest part of the norm."""
    params = telemetry.params.items()
    squares = {name: _finite(p.grad_norm[row]) ** 2 for name, p in params if p.clipped}
    total = sum(squares.values())
    if len(squares) < 2 or not total > 0:
        return ""
    name = max(squares, key=lambda it: squares[it])
    share = squares[name] / total
    return f"; {share:.0%} of its square is {name}'s{_growth_to(telemetry.params[name], row)}"


def _growth_to(param: ParamTelemetry, row: int) -> str:
    """The ratio of a gradient's norm to its usual norm."""
    norms = param.grad_norm[max(0, row - LOOK_BACK) : row]
    norms = norms[norms.isfinite() & (norms > 0)]
    if len(norms) == 0:
        return ""
    factor = (param.grad_norm[row] / norms.median()).item()
    if factor < WORTH_TELLING:
        return ""
    return f", {factor:,.3g} times its median over the {len(norms)} steps before"


def _finite(value: Tensor) -> float:
    return value.item() if value.isfinite() else 0.0
