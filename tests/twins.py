"""Optimizers that torch doesn't have, as their authors wrote them: in plain torch, in few lines."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fusedopt.core.checks import checked_defaults
from fusedopt.optimizers.ademamix import ADEMAMIX
from fusedopt.optimizers.lion import LION
from fusedopt.optimizers.own import FLAGS


class Twin(torch.optim.Optimizer):
    """A step of `update` for every parameter."""

    def __setstate__(self, state):
        super().__setstate__(state)
        for group in self.param_groups:
            for key, value in FLAGS.items():
                group.setdefault(key, value)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    grad = -param.grad if group["maximize"] else param.grad
                    self.update(group, param, grad, self.state[param])
        return loss

    def update(self, group, param, grad, state):
        raise NotImplementedError


class Lion(Twin):
    """Algorithm 2 of arXiv:2302.06675."""

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-4,
        betas=(0.9, 0.99),
        weight_decay=0.0,
        *,
        maximize=False,
        foreach=None,
        capturable=False,
        differentiable=False,
    ):
        defaults = {key: it for key, it in locals().items() if key in ("lr", "betas")}
        defaults |= {"weight_decay": weight_decay, "maximize": maximize, "foreach": foreach}
        defaults |= {"capturable": capturable, "differentiable": differentiable}
        super().__init__(params, checked_defaults(LION, defaults))

    def update(self, group, param, grad, state):
        if not state:
            state["exp_avg"] = torch.zeros_like(param)
        beta1, beta2 = group["betas"]
        average = state["exp_avg"]
        update = (beta1 * average + (1 - beta1) * grad).sign() + group["weight_decay"] * param
        param.sub_(group["lr"] * update)
        average.mul_(beta2).add_(grad, alpha=1 - beta2)


class AdEMAMix(Twin):
    """Algorithm 1 of arXiv:2409.03137, with its schedules of alpha and beta3 (section 3)."""

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        betas=(0.9, 0.999, 0.9999),
        alpha=2.0,
        beta3_warmup=None,
        alpha_warmup=None,
        eps=1e-8,
        weight_decay=0.0,
        *,
        maximize=False,
        foreach=None,
        capturable=False,
        differentiable=False,
    ):
        defaults = {"lr": lr, "betas": betas, "alpha": alpha, "beta3_warmup": beta3_warmup or 0}
        defaults |= {"alpha_warmup": alpha_warmup or 0, "eps": eps, "weight_decay": weight_decay}
        defaults |= {"maximize": maximize, "foreach": foreach}
        defaults |= {"capturable": capturable, "differentiable": differentiable}
        super().__init__(params, checked_defaults(ADEMAMIX, defaults))

    def update(self, group, param, grad, state):
        if not state:
            state["step"] = torch.zeros(())
            for name in ADEMAMIX.tensors:
                state[name] = torch.zeros_like(param)
        state["step"] += 1
        step = int(state["step"])
        beta1, beta2, beta3 = group["betas"]
        alpha, warmup = group["alpha"], group["beta3_warmup"]
        if group["alpha_warmup"]:
            alpha = min(alpha, step * alpha / group["alpha_warmup"])
        if warmup and step < warmup:
            start, end, part = math.log(beta1), math.log(beta3), step / warmup
            beta3 = min(math.exp(start * end / ((1 - part) * end + part * start)), beta3)
        fast, slow, squares = (state[name] for name in ADEMAMIX.tensors)
        fast.mul_(beta1).add_(grad, alpha=1 - beta1)
        slow.mul_(beta3).add_(grad, alpha=1 - beta3)
        squares.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denom = (squares / (1 - beta2**step)).sqrt() + group["eps"]
        update = (fast / (1 - beta1**step) + alpha * slow) / denom
        param.sub_(group["lr"] * (update + group["weight_decay"] * param))
