"""Weight decay and moments, which Adam and its family share."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fusedopt.reference import Group
from fusedopt.reference.rule import with_decay


def update_moments(
    group: Group, param: Tensor, grad: Tensor, state: dict[str, Tensor]
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Returns the parameter and the gradient after weight decay, and the new moments."""
    param, grad = with_decay(group, param, grad)
    return param, grad, new_moments(group, grad, state)


def new_moments(group: Group, grad: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The averages of the gradient and of its square."""
    beta2 = float(group["betas"][1])
    exp_avg_sq = beta2 * state["exp_avg_sq"] + ((1 - beta2) * grad) * grad
    return {"exp_avg": new_exp_avg(group, grad, state), "exp_avg_sq": exp_avg_sq}


def new_exp_avg(group: Group, grad: Tensor, state: dict[str, Tensor]) -> Tensor:
    """The average of the gradient."""
    beta1 = float(group["betas"][0])
    return beta1 * state["exp_avg"] + (1 - beta1) * grad


def moment_options(group: Group) -> dict[str, Any]:
    """The options that torch's functions of Adam and its family share."""
    beta1, beta2 = map(float, group["betas"])
    return {
        "beta1": beta1,
        "beta2": beta2,
        "lr": float(group["lr"]),
        "weight_decay": float(group["weight_decay"]),
        "eps": float(group["eps"]),
        "decoupled_weight_decay": group["decoupled_weight_decay"],
        "maximize": group["maximize"],
    }
