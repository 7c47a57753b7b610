"""The step in plain torch: the specification. Every compiled backend gives the same bits.

Every operation is computed in float32 (float64 for float64 parameters) and rounded by itself: there
is no fused multiply-add, no `alpha=`, no `lerp`. Scalars are computed in float64 and rounded once.
The order of every sum is a part of the specification: see `fusedopt.reference.norms`.
"""

from fusedopt.reference.clip_grads import clip_grads, total_norm
from fusedopt.reference.coefficients import Decision, clip_coefficient, smaller
from fusedopt.reference.decision import Control, StepOptions, decide
from fusedopt.reference.groups import Group, distinct_params, is_clipped
from fusedopt.reference.rule import Rule, Trust, TrustNorms, Twin, all_state_names, count_step
from fusedopt.reference.step import step, update, write_readings

__all__ = [
    "Control",
    "Decision",
    "Group",
    "Rule",
    "StepOptions",
    "Trust",
    "TrustNorms",
    "Twin",
    "all_state_names",
    "clip_coefficient",
    "clip_grads",
    "count_step",
    "decide",
    "distinct_params",
    "is_clipped",
    "smaller",
    "step",
    "total_norm",
    "update",
    "write_readings",
]
