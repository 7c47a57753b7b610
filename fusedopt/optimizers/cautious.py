"""Cautious steps: the option of some classes, and what their rules share."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fusedopt.core.optimizer import FusedOptimizer
from fusedopt.core.shared import Shared
from fusedopt.reference import Group, Rule, TrustNorms

_LEAST_SHARE = 1e-3


def agrees(update: Tensor, grad: Tensor) -> Tensor:
    """1 where the update and the gradient have the same sign, else 0; also where one of them is 0.

    The signs are compared: the product of the two may vanish.
    """
    return (((update > 0) & (grad > 0)) | ((update < 0) & (grad < 0))).to(update.dtype)


def inverse_share(group: Group, norms: TrustNorms) -> float:
    """One over the share of the elements that move. `norms.terms` is the norm of `agrees`."""
    moved = round(norms.terms * norms.terms)
    return 1 / max(moved / max(norms.numel, 1), _LEAST_SHARE)


class _RuleChoice:
    """The class attribute `rule`: of an optimizer that is cautious, the second rule."""

    def __init__(self, plain: Rule, cautious: Rule) -> None:
        self._rules = (plain, cautious)

    def __get__(self, owner: Any, owner_type: type) -> Rule:
        return self._rules[owner is not None and owner._own.get("cautious", False)]


def rule_choice(plain: Rule, cautious: Rule) -> Any:
    """The attribute `rule` of a class with the option `cautious`."""
    return _RuleChoice(plain, cautious)


class _Cautious(Shared[bool]):
    """The attribute `cautious`. The next step makes a plan for the other rule."""

    def __set__(self, owner: Any, value: Any) -> None:
        if type(value) is not bool:
            raise TypeError(f"cautious is {value!r}; expected True or False")
        with owner._lock:
            owner._own.update(cautious=value, plan=None)


class CautiousOption(FusedOptimizer):
    """What the classes with the option `cautious` have in common."""

    cautious = _Cautious(False)

    def _check_group(self, index: int) -> None:
        group = self.param_groups[index]
        if group.get("cautious", self.cautious) != self.cautious:
            raise ValueError(
                f"param group {index} has 'cautious', which one group can't have for itself; "
                "expected it as an argument of the optimizer, or as its attribute"
            )
        if self.cautious and not group.get("decoupled_weight_decay", True):
            raise ValueError(
                f"param group {index} has decoupled_weight_decay=False, and cautious=True; "
                "expected a decay of the parameter itself, as AdamW's is"
            )
        super()._check_group(index)
