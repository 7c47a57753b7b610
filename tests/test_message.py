"""The message of a step over ranks: kernels write and read it, and no host waits for a GPU."""

import copy
import math
from unittest import mock

import over_ranks
import pytest
import torch
import torch.distributed as dist
from cases import make_params, same_bits, set_grads
from conftest import emulated
from hypothesis import given
from hypothesis import strategies as st
from rank_tensors import on_all, same_on_all

import fusedopt
from fusedopt.core import backends
from fusedopt.distributed import Exchange, Ranks
from fusedopt.distributed.exchange import HostCopy
from fusedopt.reference import Control, message, norms

SHAPES = [(16385,), (0,), (), (700, 33), (3,)]
SCALES = [1.0, 1e30, 1e-30, math.inf, math.nan]


class Recorded(Exchange):
    """The message of one process, and what it was made of."""

    def __init__(self, counted):
        super().__init__(None, "")
        self.counted = counted
        self.messages = []

    def __call__(self, messages):
        self.messages = [it.clone() for it in messages]
        return super().__call__(messages)


def step_with(opt, exchange):
    groups, states = opt.param_groups, opt.state
    return opt._plan.step(
        groups, states, math.inf, True, True, None, None, None, opt._readings(), exchange
    )


@pytest.mark.racecheck
@pytest.mark.parametrize("scale", SCALES)
def test_kernels_write_and_read_it_as_the_reference_does(backend, scale):
    params = make_params(SHAPES, device=backend.device)
    opt = backend.make(fusedopt.FusedSGD, params, lr=0.1, nonfinite="skip")
    set_grads(params, 0)
    opt.step()
    set_grads(params, 1)
    params[3].grad[5:] *= scale
    sums = norms.chunk_sums_by_device((it, it.grad) for it in params)[0]
    counted = torch.arange(len(sums), device=backend.device) % 3 != 0
    exchange = Recorded([counted])
    before = [param.detach().clone() for param in params]
    assert step_with(opt, exchange)
    expected = message.write(sums, counted)
    assert torch.equal(exchange.messages[0], expected)
    total = message.sum_of_squares(expected.tolist())
    assert same_bits(
        opt._readings()[Control.SUM_OF_SQUARES].cpu(), torch.tensor(total, dtype=torch.float64)
    )
    assert bool(opt.step_skipped) == (not math.isfinite(total))
    unchanged = [same_bits(a, b) for a, b in zip(before, params, strict=True) if a.numel() > 0]
    assert all(unchanged) if opt.step_skipped else not any(unchanged)
    opt_wish = Recorded([counted])
    opt_wish.ask(torch.ones((), device=backend.device), False)
    assert step_with(opt, opt_wish)
    assert bool(opt.step_skipped)


def test_a_malformed_message_is_refused(backend):
    params = make_params(SHAPES, device=backend.device)
    opt = backend.make(fusedopt.FusedSGD, params, lr=0.1, nonfinite="skip")
    set_grads(params, 0)
    opt.step()
    before = copy.deepcopy(params)
    with pytest.raises(ValueError, match="counted has not one bool for each of"):
        step_with(opt, Recorded([torch.ones(2, dtype=torch.bool)]))
    exchange = Recorded([torch.ones(6, dtype=torch.bool)])
    exchange.total = lambda: torch.zeros(3)
    with pytest.raises(ValueError, match="an exchange returned no message"):
        step_with(opt, exchange)
    assert all(map(torch.equal, before, params))


@given(st.lists(st.integers(0, 2**24 - 1), min_size=1, max_size=9))
def test_digests_agree_only_if_all_are_equal(digests):
    total = torch.zeros(message.SIZE, dtype=torch.int64)
    for digest in digests:
        total[message.DIGEST] += digest
        total[message.DIGEST_SQUARED] += digest * digest
        total[message.RANKS] += 1
    assert message.is_agreed(total.tolist()) == (len(set(digests)) == 1)
    assert message.asks_for_skip(total).item() == (len(set(digests)) > 1)


def make(rank, backend="cuda", **options):
    """An optimizer whose parameters are this rank's own, and which are nobody else's."""
    params = make_params(SHAPES[rank::2])
    options = {"lr": 0.1, "max_grad_norm": 1.0, **options}
    own = {"process_group": dist.group.WORLD, "plain": "own"}
    return fusedopt.FusedAdamW(params, backend=backend, **own, **options), params


def same_bits_as_on_the_cpu(rank):
    """The norm and the update, and no step reads its own message on the host."""
    opt, params = make(rank)
    other, others = make(rank, backend="cpu")
    with mock.patch.object(HostCopy, "read", autospec=True, side_effect=HostCopy.read) as read:
        for number, scale in enumerate([1.0, 2.0, math.nan, 0.5]):
            set_grads(params, number)
            if rank == 0:
                params[0].grad *= scale
            with mock.patch.object(Ranks, "on_host", False):
                opt.step()
            # The first step waits, the third reads the second's.
            assert read.call_count == max(1, number)
    for number, scale in enumerate([1.0, 2.0, math.nan, 0.5]):
        set_grads(others, number)
        if rank == 0:
            others[0].grad *= scale
        other.step()
    assert same_bits(opt._readings(), other._readings())
    assert all(map(same_bits, params, others))
    assert same_on_all(opt.grad_norm.item())
    assert opt.skipped_steps == 1


def a_refusal_is_heard_one_step_later(rank):
    with mock.patch.object(Ranks, "on_host", False):
        for culprit in range(2):
            opt, params = make(rank)
            for number in range(2):
                set_grads(params, number)
                opt.step()
            before = copy.deepcopy(params)
            if rank == culprit:
                opt.param_groups[0]["lr"] = -1.0
                with pytest.raises(ValueError, match="learning rate"):
                    opt.step()
                opt.param_groups[0]["lr"] = 0.1
            else:
                opt.step()
                assert bool(opt.step_skipped)
            assert all(map(torch.equal, before, params))
            if rank == culprit:
                opt.step()
            else:
                said = f"rank {culprit} refused the step before this one and raises why"
                with pytest.raises(fusedopt.PeerError, match=said) as error:
                    opt.step()
                assert error.value.ranks == [culprit]
            assert not bool(opt.step_skipped)
            opt.step()
            assert same_on_all(opt.grad_norm.item())


def other_settings_change_nothing(rank):
    """At the first step all hear of it; later ones are skipped, and heard of one step later."""
    with mock.patch.object(Ranks, "on_host", False):
        opt, params = make(rank, max_grad_norm=1.0 + rank)
        set_grads(params, 0)
        before = copy.deepcopy(params)
        with pytest.raises(fusedopt.PeerError, match=f"rank {rank} has .*; other ranks have some"):
            opt.step()
        assert all(map(torch.equal, before, params))
        opt, params = make(rank)
        set_grads(params, 0)
        opt.step()
        before = copy.deepcopy(params)
        opt.max_grad_norm = 2.0 + rank
        opt.step()
        assert bool(opt.step_skipped)
        assert all(map(torch.equal, before, params))
        opt.max_grad_norm = 2.0
        with pytest.raises(fusedopt.PeerError, match="were asked for different steps"):
            opt.step()
        assert not bool(opt.step_skipped)


def names_are_told(rank):
    with mock.patch.object(Ranks, "on_host", False):
        opt, params = make(rank, nonfinite="raise")
        for number in range(2):
            set_grads(params, number)
            opt.step()
        if rank == 1:
            params[-1].grad.fill_(math.nan)
        with pytest.raises(fusedopt.NonFiniteGradientError, match="rank 1: parameter 1") as error:
            opt.step()
        assert len(set(on_all(str(error.value)))) == 1


def emulated_ranks(rank):
    backends._C = emulated()
    same_bits_as_on_the_cpu(rank)
    a_refusal_is_heard_one_step_later(rank)
    other_settings_change_nothing(rank)
    names_are_told(rank)


def test_emulated_kernels_on_two_ranks():
    over_ranks.run(emulated_ranks, 2)
