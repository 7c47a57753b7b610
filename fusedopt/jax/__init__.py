"""The compiled step for JAX on the CPU: optax's names, in place inside `jax.jit`.

    optimizer = fusedopt.jax.adamw(1e-3, max_grad_norm=1.0)
    state = optimizer.init(params)
    params, state = optimizer.step(params, grads, state)  # in jax.jit, both of them donated

`optimizer.update` is optax's protocol. It needs JAX, and no torch.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax

from fusedopt.jax.checks import check_argument
from fusedopt.jax.formula import Formula
from fusedopt.jax.optax_state import from_optax, to_optax
from fusedopt.jax.optimizer import Mask, Optimizer, make_optimizer, skips
from fusedopt.jax.step import State

__all__ = [
    "Optimizer",
    "State",
    "adam",
    "adamw",
    "from_optax",
    "nadam",
    "nadamw",
    "rmsprop",
    "sgd",
    "to_optax",
]

Number = float | jax.Array
NumberOrSchedule = Number | Callable[[jax.Array], Any]


def adam(
    learning_rate: NumberOrSchedule,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    eps_root: float | None = None,
    mu_dtype: Any = None,
    *,
    nesterov: bool = False,
    max_grad_norm: Number | None = None,
    nonfinite: str | None = None,
) -> Optimizer:
    """`optax.adam` as one step; see `adamw` for the arguments."""
    options = {"lr": learning_rate, "betas": (b1, b2), "eps": eps}
    _check_adam(eps_root, mu_dtype)
    return make_optimizer(_adam((options,), nesterov, max_grad_norm, nonfinite))


def adamw(
    learning_rate: NumberOrSchedule,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    eps_root: float | None = None,
    mu_dtype: Any = None,
    weight_decay: NumberOrSchedule = 1e-4,
    mask: Mask | None = None,
    *,
    nesterov: bool = False,
    max_grad_norm: Number | None = None,
    nonfinite: str | None = None,
) -> Optimizer:
    """`optax.adamw` as one step.

    A number may be an array, also one that changes: `optax.inject_hyperparams` works. It is then
    rounded to float32.

    Args:
        learning_rate: a number, or a schedule: a function of the count of steps.
        b1, b2: decay rates of the averages of the gradient and of its square.
        eps: added to the root.
        eps_root, mu_dtype: refused, but for 0 and None.
        weight_decay: the parameter is multiplied by 1 - learning_rate * weight_decay. It may be a
            schedule.
        mask: a tree of bools, or a function that makes one of the parameters: where it is False,
            a parameter doesn't decay. A bool may stand for a branch of the tree.
        nesterov: Nesterov momentum, as in `nadamw`.
        max_grad_norm: all gradients are clipped by one factor if their global L2 norm is larger.
            The norm is measured without overflow.
        nonfinite: "skip" changes nothing if a gradient holds inf or nan, "propagate" updates
            regardless. None is "skip" with `max_grad_norm`, else "propagate".

    Raises:
        ImportError: the kernels, or the custom call, are not compiled.
        TypeError, ValueError: an option, a parameter or a gradient is refused.
    """
    _check_adam(eps_root, mu_dtype)
    rest = {"lr": learning_rate, "betas": (b1, b2), "eps": eps, "decoupled_weight_decay": 1.0}
    both = ({**rest, "weight_decay": weight_decay}, rest)
    return make_optimizer(_adam(both, nesterov, max_grad_norm, nonfinite), mask)


nadam = functools.partial(adam, nesterov=True)
nadamw = functools.partial(adamw, nesterov=True)


def rmsprop(
    learning_rate: NumberOrSchedule,
    decay: Number = 0.9,
    eps: Number = 1e-8,
    initial_scale: Number = 0.0,
    eps_in_sqrt: bool = True,
    centered: bool = False,
    momentum: Number | None = None,
    nesterov: bool = False,
    bias_correction: bool = False,
    *,
    max_grad_norm: Number | None = None,
    nonfinite: str | None = None,
) -> Optimizer:
    """`optax.rmsprop` as one step; see `adamw` for the other arguments.

    Args:
        decay: decay rate of the average of the gradient's square.
        eps: added to that average, or to its root.
        initial_scale: the first value of that average.
        eps_in_sqrt: whether `eps` is added to the average. torch adds it to the root.
        centered: divide by the root of the variance. It is never below 0; optax's may be.
        momentum: decay rate of the sum of the steps, which hold the learning rate.
        nesterov, bias_correction: must be False.
    """
    if momentum is not None:
        check_argument("nesterov", nesterov, False, "use optax.rmsprop for it")
    advice = "use adam(b1=0.0) for it"
    check_argument("bias_correction", bias_correction, False, advice)
    options = {
        "lr": learning_rate,
        "alpha": decay,
        "eps": eps,
        "centered": float(centered),
        "momentum": 0.0 if momentum is None else momentum,
        "eps_in_sqrt": float(eps_in_sqrt),
        "lr_in_momentum": 1.0,
    }
    first = (("square_avg", initial_scale),)
    skip = skips(max_grad_norm, nonfinite)
    return make_optimizer(Formula("rmsprop", (options,), max_grad_norm, skip, first))


def sgd(
    learning_rate: NumberOrSchedule,
    momentum: Number | None = None,
    nesterov: bool = False,
    accumulator_dtype: Any = None,
    *,
    max_grad_norm: Number | None = None,
    nonfinite: str | None = None,
) -> Optimizer:
    """`optax.sgd` as one step; see `adamw` for the other arguments.

    Args:
        momentum: decay rate of the sum of the gradients.
        nesterov: Nesterov momentum.
        accumulator_dtype: must be None: the sum has the parameter's dtype.
    """
    advice = "the sum has the parameter's dtype"
    check_argument("accumulator_dtype", accumulator_dtype, None, advice)
    options = {
        "lr": learning_rate,
        "momentum": 0.0 if momentum is None else momentum,
        "nesterov": float(nesterov and momentum is not None),
    }
    return make_optimizer(
        Formula("sgd", (options,), max_grad_norm, skips(max_grad_norm, nonfinite))
    )


def _check_adam(eps_root: float | None, mu_dtype: Any) -> None:
    if eps_root is not None:
        advice = "the kernels add eps to the root, and nothing below it. Use optax.adam for it"
        check_argument("eps_root", eps_root, 0.0, advice)
    check_argument("mu_dtype", mu_dtype, None, "the averages have the parameter's dtype")


def _adam(
    options: tuple[dict[str, Any], ...],
    nesterov: bool,
    max_grad_norm: Number | None,
    nonfinite: str | None,
) -> Formula:
    """torch's NAdam has optax's momentum if the momentum decays at once."""
    skip = skips(max_grad_norm, nonfinite)
    if not nesterov:
        return Formula("adam", options, max_grad_norm, skip)
    options = tuple({**it, "momentum_decay": math.inf} for it in options)
    return Formula("nadam", options, max_grad_norm, skip, factors=("betas",))
