"""A clipped step of sharded parameters on two ranks, against torch's recipe for FSDP2.

python benchmarks/ranks.py [--tensors 1000] [--numel 64]

The ranks are two processes on the CPU, with Gloo. Of each case it prints the median and the
shortest time of a step on rank 0, in milliseconds; the ranks start each step together.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from argparse import ArgumentParser, Namespace, RawTextHelpFormatter
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.multiprocessing.spawn import spawn
from torch.nn import Parameter

import fusedopt
from fusedopt.reference import message

WORLD = 2
WARMUP, STEPS = 5, 60


def times_of(step: Callable[[], object]) -> list[float]:
    """In milliseconds."""
    found = []
    for _ in range(WARMUP + STEPS):
        dist.barrier()
        begin = time.perf_counter()
        step()
        found.append(1e3 * (time.perf_counter() - begin))
    return found[WARMUP:]


def with_grads(values: list[Tensor], grads: list[Tensor]) -> list[Parameter]:
    params = [Parameter(value) for value in values]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    return params


def torch_recipe(params: list[Parameter]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(params, fused=True)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()

    return step


def cases(args: Namespace) -> dict[str, Callable[[], object]]:
    mesh = init_device_mesh("cpu", (WORLD,))

    def plain() -> list[Tensor]:
        return [torch.randn(args.numel) for _ in range(args.tensors)]

    def sharded() -> list[Tensor]:
        return [DTensor.from_local(it, mesh, [Shard(0)]) for it in plain()]

    own = torch.zeros(message.SIZE, dtype=torch.int64)
    return {
        "fusedopt, plain tensors, no message": fusedopt.FusedAdamW(
            with_grads(plain(), plain()), max_grad_norm=1.0
        ).step,
        "all-reduce of the message": lambda: dist.all_reduce(own),
        "fusedopt, DTensors": fusedopt.FusedAdamW(
            with_grads(sharded(), sharded()), max_grad_norm=1.0
        ).step,
        "torch, DTensors: clip_grad_norm_, fused AdamW": torch_recipe(
            with_grads(sharded(), sharded())
        ),
    }


def run_rank(rank: int, store: str, args: Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=WORLD)
    for name, step in cases(args).items():
        times = times_of(step)
        if rank == 0:
            print(
                f"{name}: {statistics.median(times):.3f} ms, shortest {min(times):.3f}", flush=True
            )
    dist.barrier()
    os._exit(0)  # torch's DTensors on Gloo sometimes abort as a process ends


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawTextHelpFormatter)
    parser.add_argument("--tensors", type=int, default=1000, help="per rank (default: 1000)")
    parser.add_argument("--numel", type=int, default=64, help="of each (default: 64)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        spawn(run_rank, (str(Path(folder) / "store"), args), nprocs=WORLD)


if __name__ == "__main__":
    main()
