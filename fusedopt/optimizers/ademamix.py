"""AdEMAMix."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.optimizer import ParamsT

from fusedopt.clip import AdaptiveClip
from fusedopt.core.optimizer import Backend
from fusedopt.core.settings import MasterWeights, NonFinite, Plain, Rounding, StateDtype
from fusedopt.optimizers.own import OwnOptimizer
from fusedopt.reference import Group, Rule, count_step
from fusedopt.reference.arithmetic import exponential, power, sqrt


def _done(step: float, warmup: float) -> float:
    """How much of a warm-up is done: from 0 to 1."""
    return step / warmup if step < warmup else 1.0


def _slow_beta(group: Group, step: float) -> float:
    """Between beta1 and beta3. The half-life of the slow average grows linearly."""
    first, _, last = map(float, group["betas"])
    part = _done(step, group["beta3_warmup"])
    if part >= 1:
        return last
    inverse = (1 - part) * _inverse_log(first) + part * _inverse_log(last)
    return exponential(1 / inverse) if inverse < 0 else 0.0


def _inverse_log(beta: float) -> float:
    return 1 / math.log(beta) if beta > 0 else 0.0


def _update(
    group: Group, scalars: dict[str, Tensor], param: Tensor, grad: Tensor, state: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    beta1, beta2, _ = map(float, group["betas"])
    step = int(scalars["step"])
    beta3, alpha = _slow_beta(group, step), _done(step, group["alpha_warmup"]) * group["alpha"]
    fast = beta1 * state["exp_avg_fast"] + (1 - beta1) * grad
    slow = beta3 * state["exp_avg_slow"] + (1 - beta3) * grad
    squares = beta2 * state["exp_avg_sq"] + ((1 - beta2) * grad) * grad
    denom = sqrt(squares) * (1 / math.sqrt(1 - power(beta2, step))) + group["eps"]
    direction = (fast * (1 / (1 - power(beta1, step))) + alpha * slow) / denom
    param = param * (1 - group["lr"] * group["weight_decay"])
    new_states = {"exp_avg_fast": fast, "exp_avg_slow": slow, "exp_avg_sq": squares}
    return param - group["lr"] * direction, new_states


ADEMAMIX = Rule(
    "ademamix",
    scalars={"step": 0},
    tensors=("exp_avg_fast", "exp_avg_slow", "exp_avg_sq"),
    codings={"exp_avg_fast": "linear", "exp_avg_slow": "linear", "exp_avg_sq": "root"},
    advance=count_step,
    update=_update,
    counts={"betas": 3},
)


class FusedAdEMAMix(OwnOptimizer):
    """AdEMAMix (Pagliardini et al., 2024, arXiv:2409.03137), in one step.

    Adam with a second, slow average of the gradient. With g the unscaled and clipped gradient, m, s
    and v the averages, t the step:

        m = betas[0] m + (1 - betas[0]) g
        v = betas[1] v + (1 - betas[1]) g^2
        s = b s + (1 - b) g
        d = (m / (1 - betas[0]^t) + a s) / (sqrt(v / (1 - betas[1]^t)) + eps)
        param = (1 - lr weight_decay) param - lr d

    a grows linearly from 0 to alpha in the first `alpha_warmup` steps. b grows from betas[0] to
    betas[2] in the first `beta3_warmup` steps, so that its half-life grows linearly:
    1 / ln b = (1 - u) / ln betas[0] + u / ln betas[2], with u = t / beta3_warmup.

    State per parameter: `step` (0-d float32), `exp_avg_fast` (m), `exp_avg_slow` (s) and
    `exp_avg_sq` (v), of shape, dtype and device of the parameter. These are the names of the
    authors' code.

    Args:
        params: parameters, (name, parameter) pairs, or dicts of param groups.
        lr: learning rate, a number or a tensor of one.
        betas: how much of m, of v and of s stays from step to step.
        alpha: the weight of s.
        beta3_warmup, alpha_warmup: numbers of steps; 0 or None: there is no warm-up. A param group
            takes 0.
        eps: added to the root.
        weight_decay: by how much the parameter shrinks, as a share of lr.
        foreach, capturable: accepted as torch's classes do, and without effect: the step is always
            fused and capturable.
        maximize: go up the gradient.
        differentiable: True is refused: autograd can't look into a fused step.
        max_grad_norm: the largest global L2 norm that is not clipped, or a limit of
            `fusedopt.clip`, or None, which never clips.
        nonfinite: the reaction to inf or nan in gradients: "skip" changes nothing, "raise" raises
            `NonFiniteGradientError` as well (and waits for the device), "propagate" updates as
            torch does. None is "skip" with `max_grad_norm`, else "propagate".
        backend: "cuda", "cpu", "reference" (plain torch), or None: by the parameters' device.
        telemetry: the number of steps to keep measurements of, or None.
        max_consecutive_skips: after this number of skipped steps in a row, `step` raises
            `TooManySkipsError`; None never does.
        process_group: the ranks that step together, a ProcessGroup or a DeviceMesh; None: those
            of the parameters' mesh, if they are DTensors.
        plain: whether parameters that are no DTensors are the same on all ranks: "replicated", or
            "own" if each rank has its own.
        check_replicas: once in this many steps, the ranks compare the gradients that they should
            have in common; None: never.
        master_weights: "exact" trains 16-bit parameters as float32, with the missing bits in the
            state; "24bit" as numbers of 24 bits; None: there is no master.
        state_dtype: torch.float32, torch.bfloat16 or "8bit"; None: the states have the
            parameter's.
        rounding: "nearest", "stochastic", or None: of second moments at random, else to nearest.
        seed: of the random rounding.

    `FusedOptimizer` says more of these twelve, and of what is refused.
    """

    rule = ADEMAMIX

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 2.0,
        beta3_warmup: int | None = None,
        alpha_warmup: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        max_grad_norm: float | AdaptiveClip | None = None,
        nonfinite: NonFinite | None = None,
        backend: Backend | None = None,
        telemetry: int | None = None,
        max_consecutive_skips: int | None = None,
        process_group: ProcessGroup | DeviceMesh | None = None,
        plain: Plain = "replicated",
        check_replicas: int | None = None,
        master_weights: MasterWeights | None = None,
        state_dtype: StateDtype | None = None,
        rounding: Rounding | None = None,
        seed: int | None = None,
    ) -> None:
        self._configure(
            max_grad_norm,
            nonfinite,
            backend,
            telemetry,
            max_consecutive_skips,
            process_group,
            plain,
            check_replicas,
            master_weights=master_weights,
            state_dtype=state_dtype,
            rounding=rounding,
            seed=seed,
        )
        defaults = {
            "lr": lr,
            "betas": betas,
            "alpha": alpha,
            "beta3_warmup": 0 if beta3_warmup is None else beta3_warmup,
            "alpha_warmup": 0 if alpha_warmup is None else alpha_warmup,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # the authors' code writes None
            for key in ("beta3_warmup", "alpha_warmup"):
                group[key] = 0 if group.get(key) is None else group[key]
