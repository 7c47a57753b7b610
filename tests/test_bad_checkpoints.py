"""A checkpoint that doesn't fit is refused when it is loaded, and changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import CASES, assert_same_bits, make_params, set_grads, snapshot, tensors_of

SHAPES = [(33,), (4, 5), (7,)]


def states_of(case):
    group = case.cls([torch.zeros(1)], **case.kwargs).param_groups[0]
    return case.cls.rule.states(group)


# For every class, its first options that need a state.
STATEFUL = list({case.cls: case for case in reversed(CASES) if states_of(case)}.values())


def trained(case, seed=0, shapes=SHAPES):
    params = make_params(shapes, seed=seed)
    named = [(f"layer{i}", p) for i, p in enumerate(params)]
    groups = [{"params": named[:2]}, {"params": named[2:]}]
    optimizer = case.cls(groups, max_grad_norm=1.0, **case.kwargs)
    for step in range(2):
        set_grads(params, step)
        optimizer.step()
    return optimizer


def check_refusal(optimizer, checkpoint, error, *words):
    before, groups = snapshot(optimizer), copy.copy(optimizer.param_groups)
    options = copy.deepcopy([{**group, "params": None} for group in groups])
    kept = {p: dict(state) for p, state in optimizer.state.items()}
    attributes = optimizer.__dict__.copy()
    with pytest.raises(error) as caught:
        optimizer.load_state_dict(checkpoint)
    assert type(caught.value) is error
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert optimizer.__dict__.keys() == attributes.keys()
    assert all(optimizer.__dict__[name] is value for name, value in attributes.items())
    assert all(a is b for a, b in zip(optimizer.param_groups, groups, strict=True))
    assert [{**group, "params": None} for group in groups] == options
    assert {p: state.keys() for p, state in optimizer.state.items()} == {
        p: state.keys() for p, state in kept.items()
    }
    assert all(value is kept[p][k] for p, s in optimizer.state.items() for k, value in s.items())
    assert_same_bits(tensors_of(optimizer), before)


def change_state(change):
    """Of the parameter 1, which is called layer1 and has the shape (4, 5)."""
    return lambda checkpoint, key: change(checkpoint["state"][1], key)


def drop(state, key):
    del state[key]


CHANGES = {
    "shape": (
        change_state(lambda s, k: s.update({k: s[k].T})),
        RuntimeError,
        ["'layer1' (parameter 1 of param group 0)", "shape (5, 4)", "(4, 5)"],
    ),
    "truncated": (
        change_state(lambda s, k: s.update({k: s[k][:3]})),
        RuntimeError,
        ["layer1", "(3, 5)", "(4, 5)"],
    ),
    "missing": (change_state(drop), RuntimeError, ["layer1", "has no"]),
    "complex": (
        change_state(lambda s, k: s.update({k: s[k] + 1j})),
        TypeError,
        ["layer1", "complex64", "float32"],
    ),
    "integer": (
        change_state(lambda s, k: s.update({k: s[k].int()})),
        TypeError,
        ["layer1", "int32", "float32"],
    ),
    "float8": (
        change_state(lambda s, k: s.update({k: s[k].to(torch.float8_e4m3fn)})),
        TypeError,
        ["layer1", "float8_e4m3fn", "float32"],
    ),
    "sparse": (
        change_state(lambda s, k: s.update({k: s[k].to_sparse()})),
        TypeError,
        ["layer1", "sparse", "dense"],
    ),
    "on meta": (
        change_state(lambda s, k: s.update({k: s[k].to("meta")})),
        TypeError,
        ["layer1", "meta"],
    ),
    "freed": (
        change_state(lambda s, k: s[k].untyped_storage().resize_(0)),
        RuntimeError,
        ["layer1", "0 bytes", "80"],
    ),
    "a string": (
        change_state(lambda s, k: s.update({k: "zeros"})),
        TypeError,
        ["layer1", "a str", "tensor"],
    ),
    "a number": (
        change_state(lambda s, k: s.update({k: 0.5})),
        TypeError,
        ["layer1", "a float", "tensor"],
    ),
    "a list": (
        lambda c, k: c["state"].update({1: list(c["state"][1].values())}),
        TypeError,
        ["layer1", "a list", "dict"],
    ),
    "another class's": (
        change_state(lambda s, k: s.update({"grad_avg": s.pop(k)})),
        RuntimeError,
        ["layer1", "has no", "grad_avg"],
    ),
    "unknown id": (
        lambda c, k: c["state"].update({9: c["state"][1]}),
        ValueError,
        ["id 9", "none of its param groups"],
    ),
    "one id for two": (
        lambda c, k: c["param_groups"][0].update(params=[1, 1]),
        ValueError,
        ["id 1", "layer0", "layer1"],
    ),
    "states swapped": (
        lambda c, k: c["param_groups"][0].update(params=[1, 0]),
        RuntimeError,
        ["layer", "shape", "(4, 5)"],
    ),
    "a group less": (
        lambda c, k: c["param_groups"].pop(),
        ValueError,
        ["different number of parameter groups", "1", "expected 2"],
    ),
    "no groups": (lambda c, k: c.pop("param_groups"), ValueError, ["'param_groups'"]),
    "no state": (lambda c, k: c.pop("state"), ValueError, ["'state'"]),
    "groups of strings": (lambda c, k: c.update(param_groups=["a", "b"]), TypeError, ["group 0"]),
    "groups as a number": (lambda c, k: c.update(param_groups=2), TypeError, ["int", "list"]),
    "state as a list": (lambda c, k: c.update(state=[]), TypeError, ["list", "dict"]),
    "a parameter less": (
        lambda c, k: c["param_groups"][0].update(params=[0]),
        ValueError,
        ["doesn't match the size of optimizer's group", "param group 0 has 1", "expected 2"],
    ),
    "a name less": (
        lambda c, k: c["param_groups"][0].update(param_names=["layer0"]),
        ValueError,
        ["param_names", "param group 0 has 1", "expected 2"],
    ),
    "group without lr": (
        lambda c, k: c["param_groups"][1].pop("lr"),
        ValueError,
        ["param group 1", "no 'lr'"],
    ),
    "lr of None": (
        lambda c, k: c["param_groups"][1].update(lr=None),
        TypeError,
        ["param group 1", "lr is None", "one number"],
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("case", STATEFUL, ids=str)
def test_checkpoint_that_does_not_fit(case, change):
    if change == "missing" and not case.cls.rule.scalars:
        pytest.skip("a state that is not there at all is one that is yet to come")
    optimizer, twin = trained(case), trained(case)
    checkpoint = copy.deepcopy(trained(case, seed=1).state_dict())
    corrupt, error, words = CHANGES[change]
    corrupt(checkpoint, states_of(case)[0])
    check_refusal(optimizer, checkpoint, error, *words)
    for it in (optimizer, twin):
        set_grads([p for group in it.param_groups for p in group["params"]], 7)
        it.step()
    assert_same_bits(tensors_of(optimizer), tensors_of(twin))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1, -0.5], ids=str)
@pytest.mark.parametrize("case", STATEFUL, ids=str)
def test_number_that_no_step_has_left(case, value):
    for key in case.cls.rule.scalars:
        for given in (value, torch.tensor(value, dtype=torch.float64)):
            checkpoint = copy.deepcopy(trained(case).state_dict())
            checkpoint["state"][1][key] = given
            check_refusal(trained(case), checkpoint, ValueError, f"'{key}'", "layer1", str(value))


@pytest.mark.parametrize(
    "value", ["3", None, [3.0], torch.ones(2), torch.tensor(1j), torch.ones((), device="meta")]
)
@pytest.mark.parametrize("case", STATEFUL, ids=str)
def test_number_that_is_none(case, value):
    for key in case.cls.rule.scalars:
        checkpoint = copy.deepcopy(trained(case).state_dict())
        checkpoint["state"][1][key] = value
        check_refusal(
            trained(case), checkpoint, RuntimeError, f"'{key}'", "layer1", "expected one number"
        )


@pytest.mark.parametrize("case", [c for c in STATEFUL if "step" in c.cls.rule.scalars], ids=str)
def test_part_of_a_step(case):
    checkpoint = copy.deepcopy(trained(case).state_dict())
    checkpoint["state"][1]["step"] = 2.5
    check_refusal(trained(case), checkpoint, ValueError, "layer1", "2.5", "whole number")


@pytest.mark.parametrize("source", STATEFUL, ids=str)
@pytest.mark.parametrize("case", STATEFUL, ids=str)
def test_checkpoint_of_another_class(case, source):
    """What either class could go on with is loaded, as by torch; all else is refused."""
    optimizer, checkpoint = trained(case), trained(source).state_dict()
    twin = case.twin([{"params": g["params"]} for g in optimizer.param_groups], **case.kwargs)
    twin.load_state_dict({**checkpoint, "state": {}})  # it fills in what older checkpoints lack
    lacking = optimizer.defaults.keys() - twin.param_groups[0].keys()
    needed = {*case.cls.rule.scalars, *states_of(case)}
    there = {*source.cls.rule.scalars, *states_of(source)}
    betas = [len(it.param_groups[0].get("betas", ())) for it in (twin, optimizer)]
    if not lacking and 0 < betas[1] != betas[0]:
        expected = f"expected {betas[1]} numbers"
        check_refusal(optimizer, checkpoint, ValueError, "param group 0's betas", expected)
    elif lacking or needed - there:
        named = lacking or needed - there
        check_refusal(
            optimizer,
            checkpoint,
            ValueError if lacking else RuntimeError,
            "is it another optimizer's?",
            *map(repr, named),
        )
    else:
        optimizer.load_state_dict(checkpoint)
        optimizer.step()


@pytest.mark.parametrize("checkpoint", [None, [], "state", {}, {"state": {}}, torch.zeros(2)])
def test_no_checkpoint_at_all(checkpoint):
    check_refusal(trained(STATEFUL[0]), checkpoint, ValueError, "'state' and 'param_groups'")


def test_error_in_a_pre_hook_changes_nothing():
    optimizer = trained(STATEFUL[0])

    def fail(optimizer, state_dict):
        state_dict["param_groups"] = []
        raise KeyError("mine")

    optimizer.register_load_state_dict_pre_hook(fail)
    checkpoint = trained(STATEFUL[0], seed=1).state_dict()
    check_refusal(optimizer, checkpoint, KeyError, "mine")
    assert len(checkpoint["param_groups"]) == 2
