"""A load that is interrupted at any moment is either complete or has changed nothing."""

from __future__ import annotations

import copy
import functools
import sys

import pytest
from cases import make_params, set_grads

import fusedopt
from fusedopt.clip import PerTensor

SHAPES = [(3,), (3,), (3,)]


class InterruptedDict(dict):
    def items(self):
        raise KeyboardInterrupt


def trained(steps=2, seed=0, names="abc", lr=0.1):
    params = make_params(SHAPES, seed=seed)
    optimizer = fusedopt.FusedNAdam(
        list(zip(names, params)), lr=lr, max_grad_norm=PerTensor(warmup=2), telemetry=4
    )
    for step in range(steps):
        set_grads(params, seed + step)
        optimizer.step()
    optimizer.state["mine"] = seed
    return optimizer


def all_of(optimizer):
    """What a load changes, in numbers."""
    group = optimizer.param_groups[0]
    state = [
        {key: value.tolist() for key, value in optimizer.state.get(p, {}).items()}
        for p in group["params"]
    ]
    limit, rows = optimizer._own["clip_state"], optimizer.telemetry().step.tolist()
    options = {key: value for key, value in group.items() if key != "params"}
    return state, optimizer.state["mine"], limit.tolist(), rows, optimizer.explain(), options


traced = pytest.mark.skipif(
    sys.version_info[:2] == (3, 12), reason="Python 3.12.1 tells a tracer of few bytecodes"
)


class Interrupt:
    """Raises KeyboardInterrupt at one of the bytecodes that a call runs."""

    def __init__(self, at):
        self.left = at

    def __call__(self, frame, event, argument):
        frame.f_trace_opcodes = True
        if event == "opcode" and "fusedopt/core" in frame.f_code.co_filename:
            self.left -= 1
            if self.left < 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self

    def run(self, call):
        """Whether the call ended without an interrupt."""
        before = sys.gettrace()
        sys.settrace(self)
        try:
            call()
        except KeyboardInterrupt:
            return False
        finally:
            sys.settrace(before)
        return True


@traced
def test_interrupted_at_any_bytecode():
    checkpoint = copy.deepcopy(trained(steps=5, seed=1, names="cab", lr=0.2).state_dict())
    optimizer, loaded = trained(), trained()
    old = all_of(optimizer)
    counter = Interrupt(at=sys.maxsize)
    assert counter.run(functools.partial(loaded.load_state_dict, copy.deepcopy(checkpoint)))
    new = all_of(loaded)
    assert all(a != b for a, b in zip(old, new, strict=True))
    total = sys.maxsize - counter.left
    moments = [*range(0, total - 150, 29), *range(total - 150, total)]  # all is swapped at the end
    found = []
    for at in moments:
        load = functools.partial(optimizer.load_state_dict, copy.deepcopy(checkpoint))
        assert not Interrupt(at).run(load)
        now = all_of(optimizer)
        assert now in (old, new), at
        found.append(now == new)
        if now == new:
            optimizer = trained()
    assert total > 1000 and found == sorted(found)
    assert 0 < found.count(True) < 100


@pytest.mark.parametrize("part", ["state", "state of a parameter", "groups"])
def test_interrupted_by_the_checkpoint_itself(part):
    optimizer = trained()
    old = all_of(optimizer)
    checkpoint = copy.deepcopy(trained(seed=1, lr=0.2).state_dict())
    if part == "state":
        checkpoint["state"] = InterruptedDict(checkpoint["state"])
    elif part == "state of a parameter":
        checkpoint["state"][2] = InterruptedDict(checkpoint["state"][2])
    else:
        checkpoint["param_groups"][0]["mine"] = Uncopied()
    with pytest.raises(KeyboardInterrupt):
        optimizer.load_state_dict(checkpoint)
    assert all_of(optimizer) == old


class Uncopied:
    def __deepcopy__(self, memo):
        raise KeyboardInterrupt


@traced
def test_interrupted_while_saving():
    """States that a device may not have used are left out of a checkpoint, not of the optimizer."""
    optimizer = trained()
    params = optimizer.param_groups[0]["params"]
    optimizer.state[params[0]]["step"].zero_()
    at, states = 0, {p: dict(state) for p, state in optimizer.state.items() if p != "mine"}
    while True:
        optimizer._provisional_state.add([params[0]])
        done = Interrupt(at).run(optimizer.state_dict)
        assert {p: s for p, s in optimizer.state.items() if p != "mine"} == states
        if done:
            break
        at += 1
    assert at > 100
    assert optimizer.state_dict()["state"].keys() == {1, 2, "mine"}


def test_an_error_in_a_subclass_changes_nothing():
    class Picky(fusedopt.FusedAdam):
        def __setstate__(self, state):
            super().__setstate__(state)
            self.seen = len(state["state"])
            if state["state"]:
                raise RuntimeError("mine")

    optimizer = Picky(make_params(SHAPES))
    checkpoint = fusedopt.FusedAdam(make_params(SHAPES))
    set_grads(checkpoint.param_groups[0]["params"], 0)
    checkpoint.step()
    with pytest.raises(RuntimeError, match="mine"):
        optimizer.load_state_dict(checkpoint.state_dict())
    assert not optimizer.state and "seen" not in vars(optimizer)


def test_a_subclass_may_set_attributes_as_it_loads():
    class Counting(fusedopt.FusedAdam):
        def __setstate__(self, state):
            super().__setstate__(state)
            self.seen = len(self.state)

    source = fusedopt.FusedAdam(make_params(SHAPES))
    set_grads(source.param_groups[0]["params"], 0)
    source.step()
    optimizer = Counting(make_params(SHAPES))
    optimizer.load_state_dict(source.state_dict())
    assert optimizer.seen == 3 == len(optimizer.state)
