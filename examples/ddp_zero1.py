"""Trains with DDP; each rank keeps the optimizer's states of a part of the parameters (ZeRO-1).

torchrun --nproc-per-node 2 examples/ddp_zero1.py
"""

from argparse import ArgumentParser, RawTextHelpFormatter
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fusedopt

FEATURES, HIDDEN, CLASSES, BATCH = 20, 256, 5, 32


def make_model() -> nn.Module:
    torch.manual_seed(0)  # DDP sends the weights of rank 0 anyway
    sizes = [FEATURES, HIDDEN, HIDDEN, HIDDEN]
    layers = [nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in pairwise(sizes)]
    return nn.Sequential(*layers, nn.Linear(HIDDEN, CLASSES))


def batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    """Each rank has other samples: the class is the largest of the first features."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    inputs = torch.randn(BATCH, FEATURES, generator=generator)
    return inputs, inputs[:, :CLASSES].argmax(1)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    tensors = [it for state in optimizer.state.values() for it in state.values()]
    return sum(it.numel() * it.element_size() for it in tensors)


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="how many (default: 100)")
    parser.add_argument("--output", help="a file for a checkpoint at the end (default: none)")
    args = parser.parse_args()
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = DistributedDataParallel(make_model())
    optimizer = fusedopt.FusedAdamW(model.parameters(), lr=1e-3, max_grad_norm=1.0)
    fusedopt.shard_states(optimizer)  # the only line that ZeRO-1 needs
    for step in range(args.steps):
        inputs, classes = batch(step, rank)
        loss = nn.functional.cross_entropy(model(inputs), classes)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0 and (step + 1) % 10 == 0:
            print(f"step {step + 1}: loss {loss:.3f}, gradient norm {optimizer.grad_norm:.3f}")
    sizes = [0] * dist.get_world_size()
    dist.all_gather_object(sizes, state_bytes(optimizer))
    if rank == 0:
        print(f"bytes of optimizer state per rank: {', '.join(f'{it:,}' for it in sizes)}")
    if args.output:
        state = fusedopt.consolidated_state_dict(optimizer)  # all ranks call it, rank 0 gets it
        if rank == 0:
            torch.save({"model": model.module.state_dict(), "optimizer": state}, args.output)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
