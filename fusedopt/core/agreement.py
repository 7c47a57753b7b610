"""Compares the constants of Python and of the compiled kernels."""

from __future__ import annotations

from typing import Any

from fusedopt.core.extension import INSTALL, Found
from fusedopt.reference import blocks, message, norms
from fusedopt.reference.decision import Control
from fusedopt.reference.limits import LIMITS
from fusedopt.reference.rule import Rule
from fusedopt.telemetry.rings import PARAM_COLUMNS, STEP_COLUMNS


def known_here() -> dict[str, Any]:
    """Python's values of `_C.constants`, except for the rules."""
    limits = sorted(LIMITS, key=lambda limit: limit.kind)
    return {
        "chunk_size": norms.CHUNK_SIZE,
        "row_bytes": norms.ROW_BYTES,
        "run_size": norms.RUN_SIZE,
        "smallest_sum": norms.SMALLEST_SUM,
        "tensor_lanes": norms.TENSOR_LANES,
        "block_size": blocks.BLOCK_SIZE,
        "control": Control.FIELDS,
        "step_columns": STEP_COLUMNS,
        "param_columns": PARAM_COLUMNS,
        "message": (message.LIMBS, message.COUNTS),
        "limits": (("Fixed", 0), *((it.__name__, len(it.argument_names())) for it in limits)),
    }


def checked(found: Found) -> Found:
    """The extension if its constants agree with Python's; else the reason why it can't be used."""
    if found.module is None:
        return found
    constants = getattr(found.module, "constants", {})
    for name, expected in known_here().items():
        if constants.get(name) != expected:
            reason = (
                f"{found.module.__file__} was compiled from other sources: its {name} is "
                f"{constants.get(name)!r}, and this fusedopt expects {expected!r}. Build it again: "
                f"`{INSTALL}` in the source folder"
            )
            return found._replace(module=None, reason=reason, broken=True)
    return found


def check_rule(rule: Rule, constants: dict[str, Any]) -> None:
    """Refuses a rule if it has no kernels, or if they keep other states or scalars.

    Raises:
        ImportError: they differ, or there are none.
    """
    if rule.name not in constants["rules"]:
        raise ImportError(
            f"the extension was compiled from other sources: it has no kernels of {rule.name}. "
            f"Build it again: `{INSTALL}` in the source folder"
        )
    scalars, states, codings = constants["rules"][rule.name]
    kept = [*scalars.items()], (*states,), codings
    arrays = (*rule.tensors, *rule.scratch)
    expected = [*(rule.scalars or {rule.counter: 0}).items()], arrays, {**rule.codings}
    if kept != expected:
        raise ImportError(
            f"the kernels of {rule.name} keep {kept!r} for a parameter, but this fusedopt "
            f"expects {expected!r}: build the extension again"
        )
