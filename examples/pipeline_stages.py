"""Two stages of a model on two ranks, by hand: one norm, one decision.

torchrun --nproc-per-node 2 examples/pipeline_stages.py
"""

import math
from argparse import ArgumentParser, RawTextHelpFormatter

import torch
import torch.distributed as dist
from torch import nn

import fusedopt

FEATURES, HIDDEN, CLASSES, BATCH = 20, 64, 5, 32


def make_stage(rank: int) -> nn.Module:
    torch.manual_seed(rank)
    if rank == 0:
        return nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.Tanh())
    return nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, CLASSES))


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Both ranks make the same one: the first uses its inputs, the second its classes."""
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(BATCH, FEATURES, generator=generator)
    return inputs, inputs[:, :CLASSES].argmax(1)


def first_stage(stage: nn.Module, inputs: torch.Tensor) -> float:
    hidden = stage(inputs)
    dist.send(hidden.detach(), 1)
    grad = torch.empty_like(hidden)
    dist.recv(grad, 1)
    hidden.backward(grad)
    return math.nan  # the last stage knows the loss


def last_stage(stage: nn.Module, classes: torch.Tensor) -> float:
    hidden = torch.empty(BATCH, HIDDEN)
    dist.recv(hidden, 0)
    loss = nn.functional.cross_entropy(stage(hidden.requires_grad_()), classes)
    loss.backward()
    assert hidden.grad is not None
    dist.send(hidden.grad, 0)
    return loss.item()


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="how many (default: 100)")
    args = parser.parse_args()
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    stage = make_stage(rank)
    optimizer = fusedopt.FusedAdamW(
        stage.parameters(),
        lr=1e-2,
        max_grad_norm=1.0,
        process_group=dist.group.WORLD,  # the ranks that step together
        plain="own",  # and each has parameters of its own
    )
    for step in range(args.steps):
        inputs, classes = batch(step)
        loss = first_stage(stage, inputs) if rank == 0 else last_stage(stage, classes)
        optimizer.step()
        optimizer.zero_grad()
        if rank == 1 and (step + 1) % 10 == 0:
            print(f"step {step + 1}: loss {loss:.3f}, gradient norm {optimizer.grad_norm:.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
