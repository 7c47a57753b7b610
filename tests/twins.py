"""Optimizers that torch doesn't have, as their authors wrote them: in plain torch, in few lines."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fusedopt.core.checks import checked_defaults
from fusedopt.optimizers.ademamix import ADEMAMIX
from fusedopt.optimizers.lamb import LAMB as LAMB_RULE
from fusedopt.optimizers.lars import LARS as LARS_RULE
from fusedopt.optimizers.lion import LION
from fusedopt.optimizers.own import FLAGS
from fusedopt.optimizers.stable_adamw import STABLE_ADAMW


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


def cautious(average, grad):
    """The mask of the authors' C-Optim, c_adamw.py; timm has it for Lion as well."""
    mask = (average * grad > 0).to(grad.dtype)
    return mask / mask.mean().clamp_(min=1e-3)


class CautiousLion(Lion):
    """Algorithm 2 of arXiv:2302.06675 with the mask of arXiv:2411.16085."""

    def update(self, group, param, grad, state):
        if not state:
            state["exp_avg"] = torch.zeros_like(param)
        beta1, beta2 = group["betas"]
        average = state["exp_avg"]
        update = (beta1 * average + (1 - beta1) * grad).sign()
        update = update * cautious(update, grad) + group["weight_decay"] * param
        param.sub_(group["lr"] * update)
        average.mul_(beta2).add_(grad, alpha=1 - beta2)


class CautiousAdamW(Twin, torch.optim.AdamW):
    """AdamW with the mask of arXiv:2411.16085, and torch's arguments and states."""

    __init__ = torch.optim.AdamW.__init__
    __setstate__ = torch.optim.AdamW.__setstate__

    def update(self, group, param, grad, state):
        if not state:
            on_device = group["capturable"] or group["fused"]
            state["step"] = torch.zeros((), device=param.device if on_device else None)
            for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 2 + group["amsgrad"]]:
                state[name] = torch.zeros_like(param)
        state["step"] += 1
        mean, squares, (beta1, beta2) = state["exp_avg"], state["exp_avg_sq"], group["betas"]
        mean.mul_(beta1).add_(grad, alpha=1 - beta1)
        squares.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        if group["amsgrad"]:
            squares = torch.maximum(state["max_exp_avg_sq"], squares, out=state["max_exp_avg_sq"])
        first = mean / (1 - beta1 ** int(state["step"]))
        second = squares / (1 - beta2 ** int(state["step"]))
        update = first / (second.sqrt() + group["eps"])
        param.mul_(1 - group["lr"] * group["weight_decay"])
        param.sub_(group["lr"] * update * cautious(mean, grad))


def flags(maximize, foreach, capturable, differentiable):
    names = ("maximize", "foreach", "capturable", "differentiable")
    return dict(zip(names, (maximize, foreach, capturable, differentiable)))


class LARS(Twin):
    """timm's `Lars`: the ratio of arXiv:1708.03888, then torch's SGD."""

    def __init__(
        self,
        params,
        lr: float | Tensor = 1.0,
        momentum=0,
        dampening=0,
        weight_decay=0.0,
        nesterov=False,
        trust_coefficient=0.001,
        eps=1e-8,
        trust_clip=False,
        always_adapt=False,
        *,
        maximize=False,
        foreach=None,
        capturable=False,
        differentiable=False,
    ):
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError(
                f"nesterov=True with momentum={momentum} and dampening={dampening}; expected a "
                "momentum > 0 and no dampening"
            )
        defaults = {"lr": lr, "momentum": momentum, "dampening": dampening, "nesterov": nesterov}
        defaults |= {"weight_decay": weight_decay, "trust_coefficient": trust_coefficient}
        defaults |= {"eps": eps, "trust_clip": trust_clip, "always_adapt": always_adapt}
        defaults |= flags(maximize, foreach, capturable, differentiable)
        super().__init__(params, checked_defaults(LARS_RULE, defaults))

    def __setstate__(self, state):
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("nesterov", False)

    def update(self, group, param, grad, state):
        decay, momentum, lr = group["weight_decay"], group["momentum"], group["lr"]
        if decay != 0 or group["always_adapt"]:
            param_norm, grad_norm = param.double().norm(), grad.double().norm()
            ratio = group["trust_coefficient"] * param_norm
            ratio = ratio / (grad_norm + param_norm * decay + group["eps"])
            ratio = torch.where((param_norm > 0) & (grad_norm > 0), ratio, 1.0)
            if group["trust_clip"]:
                ratio = torch.clamp(ratio / lr, max=1.0)
            grad = (grad + decay * param) * ratio.to(grad.dtype)
        if momentum != 0:
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = grad.clone()
            else:
                state["momentum_buffer"].mul_(momentum).add_(grad, alpha=1 - group["dampening"])
            buffer = state["momentum_buffer"]
            grad = grad + momentum * buffer if group["nesterov"] else buffer
        param.sub_(lr * grad)


class LAMB(Twin):
    """Apex's `FusedLAMB`, as multi_tensor_lamb.cu has it: arXiv:1904.00962 with phi(z) = z."""

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        betas=(0.9, 0.999),
        eps=1e-6,
        weight_decay=0.01,
        *,
        bias_correction=True,
        trust_clip=False,
        always_adapt=False,
        maximize=False,
        foreach=None,
        capturable=False,
        differentiable=False,
    ):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        defaults |= {"bias_correction": bias_correction, "trust_clip": trust_clip}
        defaults |= {"always_adapt": always_adapt}
        defaults |= flags(maximize, foreach, capturable, differentiable)
        super().__init__(params, checked_defaults(LAMB_RULE, defaults))

    def update(self, group, param, grad, state):
        if not state:
            state["step"] = torch.zeros(())
            for name in LAMB_RULE.tensors:
                state[name] = torch.zeros_like(param)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        mean, squares, decay = state["exp_avg"], state["exp_avg_sq"], group["weight_decay"]
        mean.mul_(beta1).add_(grad, alpha=1 - beta1)
        squares.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        corrections = [1 - beta ** int(state["step"]) for beta in (beta1, beta2)]
        first, second = corrections if group["bias_correction"] else (1.0, 1.0)
        update = (mean / first) / ((squares / second).sqrt() + group["eps"]) + decay * param
        ratio = 1.0
        if decay != 0 or group["always_adapt"]:
            param_norm, update_norm = param.double().norm(), update.double().norm()
            if param_norm > 0 and update_norm > 0:  # timm's comparison: nan gives 1
                ratio = (param_norm / update_norm).item()
        if group["trust_clip"]:
            ratio = min(ratio, 1.0)
        param.sub_(group["lr"] * ratio * update)


class StableAdamW(Twin):
    """Algorithm 2 of arXiv:2304.13013, with the averages of Adam in place of its debiased ones."""

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        betas=(0.9, 0.99),
        eps=1e-6,
        weight_decay=0.01,
        *,
        maximize=False,
        foreach=None,
        capturable=False,
        differentiable=False,
    ):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        defaults |= flags(maximize, foreach, capturable, differentiable)
        super().__init__(params, checked_defaults(STABLE_ADAMW, defaults))

    def update(self, group, param, grad, state):
        if not state:
            state["step"] = torch.zeros(())
            for name in STABLE_ADAMW.tensors:
                state[name] = torch.zeros_like(param)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        mean, squares, eps = state["exp_avg"], state["exp_avg_sq"], group["eps"]
        mean.mul_(beta1).add_(grad, alpha=1 - beta1)
        squares.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        first, second = (
            mean / (1 - beta1 ** int(state["step"])),
            squares / (1 - beta2 ** int(state["step"])),
        )
        lr = group["lr"]
        if param.numel() > 0:
            ratios = grad.double().square() / second.double().clamp_min(eps**2)
            lr = lr / max(1.0, ratios.mean().sqrt().item())
        param.mul_(1 - lr * group["weight_decay"]).sub_(lr * first / (second.sqrt() + eps))


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
