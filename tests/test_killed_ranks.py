"""A rank is killed, or stops: the others hold the old bits or the whole step, and say so."""

import signal

import pytest
import torch
from killed_run import (
    MOMENTS,
    SAVE_EVERY,
    WORLD,
    World,
    check_said,
    final_bits,
    fork_server,
    killed_rounds,
)


@pytest.fixture(scope="module")
def context():
    return fork_server()


def test_a_run_that_is_killed_and_resumed_ends_with_the_same_bits(context, tmp_path):
    folders = [tmp_path / "killed", tmp_path / "undisturbed"]
    for folder in folders:
        folder.mkdir()
    for moment in MOMENTS:
        said = World(context, str(folders[0]), 3 * SAVE_EVERY, moment).end()
        check_said(said)
        expected = range(WORLD - 1)
        assert set(said) <= set(expected)
        assert moment != "before" or set(said) == set(expected)
    killed_rounds(context, str(folders[0]), 2, 3 * SAVE_EVERY)
    killed, undisturbed = (final_bits(context, str(it), 3 * SAVE_EVERY) for it in folders)
    assert all(torch.equal(a, b) for a, b in zip(killed, undisturbed, strict=True))


def test_a_rank_that_stops_is_noticed_in_the_groups_time(context, tmp_path):
    world = World(context, str(tmp_path), 10**6, timeout=3)
    world.wait_until_ready()
    world.signal(0, signal.SIGSTOP)
    for process in world.ranks[1:]:
        process.join(30)
    assert not any(process.is_alive() for process in world.ranks[1:])
    world.signal(0, signal.SIGKILL)
    said = world.end()
    assert set(said) == {1, 2}
    check_said(said)
