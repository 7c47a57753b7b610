"""The norm has the same bits for any deal of whole tensors, rank order and split of a group."""

import math
import os

import over_ranks
import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rank_tensors import counted_all_reduces, on_all
from torch.nn.parallel import DistributedDataParallel

import fusedopt
from fusedopt.core import backends
from fusedopt.reference import norms

SHAPES = [(5,), (), (16385,), (200, 130), (3,), (1,), (0,), (700,)]
QUICK = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


def tensors(scales):
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in SHAPES]
    return [value * 2.0**scale for value, scale in zip(values, scales, strict=True)]


def norm_of_this_rank(rank, deal, grads, reverse, groups):
    """The sum of squares that this rank's optimizer has, with its part of the gradients."""
    mine = [i for i, owner in enumerate(deal) if owner == rank]
    params = []
    for i in reversed(mine) if reverse else mine:
        params.append(torch.nn.Parameter(torch.zeros(SHAPES[i])))
        params[-1].grad = grads[i].clone()
    parts = [params[::2], params[1::2]] if groups == 2 else [params]
    opt = fusedopt.FusedSGD(
        [{"params": part} for part in parts],
        lr=0.1,
        max_grad_norm=1.0,
        process_group=dist.group.WORLD,
        plain="own",
    )
    opt.step()
    return opt._readings()[0].item()


def any_deal(rank, world):
    """All ranks draw the same examples."""

    @QUICK
    @given(
        st.lists(st.integers(0, world - 1), min_size=len(SHAPES), max_size=len(SHAPES)),
        st.lists(st.integers(-60, 60), min_size=len(SHAPES), max_size=len(SHAPES)),
        st.booleans(),
        st.integers(1, 2),
    )
    def check(deal, scales, reverse, groups):
        grads = tensors(scales)
        sums = torch.cat([norms.chunk_sums(it, it) for it in grads])
        found = norm_of_this_rank(rank, deal, grads, reverse, groups)
        assert found == math.fsum(sums.tolist()), (deal, scales, found)

    check()


@pytest.mark.parametrize("world", [2, 3])
def test_the_bits_are_those_of_the_exact_sum_for_any_deal(world):
    over_ranks.run(any_deal, world, world)


def ddp_of_unlike_ranks(rank):
    """Other threads and another instruction set on rank 1: the same bits, and no message."""
    if rank == 1:  # the kernels read it when they first run
        os.environ["FUSEDOPT_ISA"] = "baseline"
        assert backends._C.cpu_isa() == "baseline"
    torch.manual_seed(0)
    model = DistributedDataParallel(
        torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.Linear(200, 7))
    )
    opt = fusedopt.FusedAdamW(model.parameters(), lr=0.1, max_grad_norm=0.1)
    torch.set_num_threads(1 + rank)
    for step in range(3):
        opt.zero_grad()
        inputs = torch.randn(4, 300, generator=torch.Generator().manual_seed(10 * step + rank))
        model(inputs).square().sum().backward()
        with counted_all_reduces() as calls:
            opt.step()
        assert not calls
        bits = [it.detach().view(torch.int32).tolist() for it in model.parameters()]
        first, second = on_all((bits, opt._readings().tolist()))
        assert first == second


def test_ddp_with_other_threads_and_instructions():
    over_ranks.run(ddp_of_unlike_ranks, 2)
