"""A name belongs to its parameter, at any place in the param groups."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from cases import make_params, set_grads

import fusedopt

NAMES = ["a", "b", "c"]


def make(names=NAMES, **options):
    params = make_params([(3,), (3,), (3,)])
    return fusedopt.FusedAdam(zip(names, params), telemetry=8, **options), params


def blamed(optimizer, param):
    """The name that `explain()` gives for a skip, if this parameter's gradient holds nan."""
    for group in optimizer.param_groups:
        set_grads(group["params"], 0)
    param.grad.fill_(math.nan)
    optimizer.nonfinite = "skip"
    optimizer.step()
    told = optimizer.explain().splitlines()[0]
    optimizer.nonfinite = "raise"
    with pytest.raises(fusedopt.NonFiniteGradientError) as caught:
        optimizer.step()
    name = told.split("skipped: ")[1].split(",")[0]
    assert caught.value.names[0].startswith((f"{name!r} (", name))
    return name


# What people do to a list, and the names of what is then in it.
EDITS = {
    "filtered": (lambda g, new: [g["params"][2]], ["c"]),
    "reordered": (lambda g, new: g["params"][::-1], ["c", "b", "a"]),
    "appended to": (lambda g, new: [*g["params"], new], [*NAMES, None]),
    "put before": (lambda g, new: [new, *g["params"][1:]], [None, "b", "c"]),
    "a tuple": (lambda g, new: (g["params"][1], new), ["b", None]),
    "a ParameterList": (lambda g, new: torch.nn.ParameterList(g["params"][1:]), ["b", "c"]),
    "sorted in place": (lambda g, new: g["params"].reverse(), ["c", "b", "a"]),
    "popped from": (lambda g, new: g["params"].pop(0), ["b", "c"]),
}


@pytest.mark.parametrize("when", ["at once", "after a step"])
@pytest.mark.parametrize("edit", EDITS)
def test_names_follow_an_edited_list(edit, when):
    optimizer, params = make()
    group = optimizer.param_groups[0]
    if when == "after a step":
        set_grads(params, 0)
        optimizer.step()
    new = make_params([(3,)])[0]
    change, expected = EDITS[edit]
    changed = change(group, new)
    if not isinstance(changed, torch.Tensor | None):
        group["params"] = changed
    expected = [n or f"parameter {i} of param group 0" for i, n in enumerate(expected)]
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["param_names"] == group["param_names"] == expected
    assert list(optimizer.telemetry().params) == [
        name for name, p in zip(expected, group["params"]) if when != "after a step" or p is not new
    ]
    optimizer.load_state_dict(copy.deepcopy(saved))
    assert optimizer.param_groups[0]["param_names"] == expected
    if isinstance(group["params"], list | tuple):
        group = optimizer.param_groups[0]
        assert [blamed(optimizer, p) for p in group["params"]] == expected


def test_a_parameter_that_moves_to_another_group_takes_its_name_along():
    params = make_params([(3,)] * 4)
    groups = [{"params": [("a", params[0]), ("b", params[1])]}, {"params": [("c", params[2])]}]
    optimizer = fusedopt.FusedAdam(groups, telemetry=2)
    first, second = optimizer.param_groups
    second["params"].append(first["params"].pop(0))
    second["params"].append(params[3])
    optimizer.state_dict()
    assert first["param_names"] == ["b"]
    assert second["param_names"] == ["c", "a", "parameter 2 of param group 1"]
    optimizer.param_groups.reverse()
    optimizer.param_groups.append({**first, "params": [params[0]]})
    second["params"] = second["params"][:1]
    optimizer.state_dict()
    assert [g["param_names"] for g in optimizer.param_groups] == [["c"], ["b"], ["a"]]


def test_a_place_is_that_of_now():
    optimizer, _ = make()
    group = optimizer.param_groups[0]
    group["params"].append(make_params([(3,)])[0])
    assert optimizer.state_dict()["param_groups"][0]["param_names"][3].startswith("parameter 3 ")
    group["params"].insert(0, group["params"].pop())
    names = optimizer.state_dict()["param_groups"][0]["param_names"]
    assert names == ["parameter 0 of param group 0", *NAMES]
    group["params"][0].grad = torch.zeros(3).to_sparse()
    with pytest.raises(RuntimeError, match=r"^the gradient of parameter 0 of param group 0 is "):
        optimizer.step()


def test_names_that_are_edited_count():
    optimizer, params = make()
    group = optimizer.param_groups[0]
    optimizer.state_dict()
    group["param_names"][1] = "B"
    assert blamed(optimizer, params[1]) == "B"
    group["params"].reverse()
    group["param_names"].reverse()
    assert [blamed(optimizer, p) for p in params] == ["a", "B", "c"]
    group["params"], group["param_names"] = params[1:], ["x", "y"]
    assert [blamed(optimizer, p) for p in params[1:]] == ["x", "y"]
    group["param_names"].append("too many")
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["x", "y"]


@pytest.mark.parametrize("names", [None, 5, "abcd", ["x"], {}], ids=str)
def test_what_is_no_list_of_names_changes_none(names):
    optimizer, params = make()
    optimizer.param_groups[0]["param_names"] = names
    assert [blamed(optimizer, p) for p in params] == NAMES
    del optimizer.param_groups[0]["param_names"]
    optimizer.max_grad_norm = fusedopt.clip.Unit()
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == NAMES


@pytest.mark.parametrize("names", [[["x"], {}, None], [1, 2, 3]], ids=str)
def test_names_of_a_checkpoint_that_are_no_strings(names):
    optimizer, _ = make()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["param_names"] = names
    with pytest.raises(ValueError, match="other names"):
        optimizer.load_state_dict(saved)
    plain = fusedopt.FusedAdam(make_params([(3,)] * 3))
    plain.load_state_dict(saved)
    saved["param_groups"][0]["param_names"] = 5
    with pytest.raises(TypeError, match="group 0 has a int as 'param_names'; expected a list"):
        optimizer.load_state_dict(saved)


def test_a_parameter_that_comes_back_has_its_name():
    optimizer, params = make()
    set_grads(params, 0)
    optimizer.step()
    group = optimizer.param_groups[0]
    group["params"] = params[2:]
    optimizer.step()
    optimizer.state_dict()
    group["params"] = params
    assert [blamed(optimizer, p) for p in params] == NAMES


def test_what_is_no_longer_listed_is_not_kept_alive():
    optimizer, params = make()
    optimizer.param_groups[0]["params"] = params[:1]
    optimizer.state_dict()
    kept = [it for it, _ in optimizer._names._named.values()]
    assert len(kept) == 1 and kept[0] is params[0]


def test_the_state_of_what_is_no_longer_listed_is_not_saved():
    optimizer, params = make()
    set_grads(params, 0)
    optimizer.step()
    optimizer.param_groups[0]["params"] = params[1:]
    saved = optimizer.state_dict()
    assert saved["state"].keys() == {0, 1} and saved["param_groups"][0]["params"] == [0, 1]
    assert saved["state"][0]["exp_avg"] is optimizer.state[params[1]]["exp_avg"]


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"]
)
def test_a_copy_has_the_names_of_its_own_parameters(copied):
    optimizer, params = make()
    set_grads(params, 0)
    optimizer.step()
    optimizer.param_groups[0]["params"] = [params[2], params[0]]
    again = copied(optimizer)
    first, second = again.param_groups[0]["params"]
    assert [blamed(again, p) for p in (first, second)] == ["c", "a"]
    again.param_groups[0]["params"] = [second, first]
    assert [blamed(again, p) for p in (first, second)] == ["c", "a"]
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["c", "a"]


class TestNameParams:
    """`name_params` names parameters if other code makes the optimizer."""

    def make(self):
        model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
        late = torch.nn.Parameter(torch.ones(2))
        groups = [{"params": [model[1].weight, late]}, {"params": [model[0].bias]}]
        return model, fusedopt.FusedAdam(groups, telemetry=4)

    @pytest.mark.parametrize("how", ["module", "pairs"])
    def test_all_have_names_afterwards(self, how):
        model, optimizer = self.make()
        optimizer.name_params(model if how == "module" else model.named_parameters())
        expected = [["1.weight", "parameter 1 of param group 0"], ["0.bias"]]
        assert [g["param_names"] for g in optimizer.param_groups] == expected
        assert list(optimizer.telemetry().params) == [n for names in expected for n in names]
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer.name_params([("late", optimizer.param_groups[0]["params"][1])])
        assert optimizer.param_groups[0]["param_names"] == ["1.weight", "late"]
        assert optimizer.param_groups[1]["param_names"] == ["0.bias"]

    def test_a_shared_parameter_has_its_first_name(self):
        model, optimizer = self.make()
        weight = model[1].weight
        optimizer.name_params([("first", weight), ("second", weight)])
        assert optimizer.param_groups[0]["param_names"][0] == "first"

    @pytest.mark.parametrize(
        ("named", "error", "words"),
        [
            (3, TypeError, "given a int; expected a Module"),
            ("weights", TypeError, "given a str; expected a Module"),
            (torch.ones(2), TypeError, "given a Tensor; expected a Module"),
            ([torch.ones(2)], TypeError, "given a Tensor; expected a Module"),
            ([(torch.ones(2), "a")], TypeError, r"a pair of \(Tensor, str\)"),
            ([("a", torch.ones(2)), ("a", torch.ones(2))], ValueError, "with the name 'a'"),
            (torch.nn.Linear(2, 2), ValueError, "a Linear that has no parameter of this FusedAdam"),
        ],
        ids=str,
    )
    def test_refusals_change_nothing(self, named, error, words):
        _, optimizer = self.make()
        with pytest.raises(error, match=words):
            optimizer.name_params(named)
        assert all("param_names" not in group for group in optimizer.param_groups)


# --- checkpoints with names


def averages(optimizer):
    """By name, of what each parameter has seen."""
    return {
        name: optimizer.state[param]["exp_avg"][0].item()
        for group in optimizer.param_groups
        for name, param in zip(group["param_names"], group["params"])
    }


def fresh(*names):
    params = [make_params([(3,)] * len(group)) for group in names]
    return fusedopt.FusedAdam([{"params": list(zip(*pair))} for pair in zip(names, params)])


def saved_of(*names):
    source = fresh(*names)
    for i, group in enumerate(source.param_groups):
        group["lr"] = 0.5 + i
        for j, param in enumerate(group["params"]):
            param.grad = torch.full_like(param, 1.0 + i + 10 * j)
    source.step()
    return averages(source), source.state_dict()


@pytest.mark.parametrize(
    "there",
    [
        (["a", "b"], ["c"]),
        (["b", "a"], ["c"]),
        (["c"], ["b", "a"]),
        (["module.a", "module.b"], ["module.c"]),
        (["_orig_mod.c"], ["_orig_mod.b", "_orig_mod.a"]),
    ],
    ids=str,
)
def test_a_checkpoint_in_another_order_is_loaded_by_name(there):
    optimizer = fresh(["a", "b"], ["c"])
    expected, saved = saved_of(*there)
    optimizer.load_state_dict(saved)
    expected = {name.split(".")[-1]: value for name, value in expected.items()}
    assert averages(optimizer) == expected
    lr = {name: 0.5 + i for i, group in enumerate(there) for name in group}
    assert [g["lr"] for g in optimizer.param_groups] == [
        next(value for name, value in lr.items() if name.endswith(wanted)) for wanted in "ac"
    ]
    assert [g["param_names"] for g in optimizer.param_groups] == [["a", "b"], ["c"]]


@pytest.mark.parametrize(
    ("there", "words"),
    [
        ((["a", "x"], ["c"]), ["'x' there, and 'b' here", "not there are 'b'", "not here are 'x'"]),
        ((["x", "y"], ["z"]), ["parameter 0 of param group 0", "'x', 'y', 'z'"]),
        ((["a", "c"], ["b"]), ["other param groups", "'b' in group 1"]),
        ((["a", "a"], ["c"]), ["not there are 'b'"]),
    ],
    ids=str,
)
def test_a_checkpoint_of_other_names_is_refused(there, words):
    optimizer = fresh(["a", "b"], ["c"])
    _, saved = saved_of(*there)
    with pytest.raises(ValueError, match="loaded state dict") as caught:
        optimizer.load_state_dict(saved)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "delete 'param_names'" in message and not optimizer.state
    for group in saved["param_groups"]:
        del group["param_names"]
    optimizer.load_state_dict(saved)  # by place, as it says
    assert len(optimizer.state) == 3
    assert [g["param_names"] for g in optimizer.param_groups] == [["a", "b"], ["c"]]


def test_a_checkpoint_without_names_goes_by_place():
    params = make_params([(3,)] * 2)
    source = torch.optim.Adam(params)
    set_grads(params, 0)
    source.step()
    optimizer = fresh(["a", "b"])
    optimizer.load_state_dict(source.state_dict())
    assert optimizer.param_groups[0]["param_names"] == ["a", "b"]
    for ours, theirs in zip(optimizer.param_groups[0]["params"], params):
        assert torch.equal(optimizer.state[ours]["exp_avg"], source.state[theirs]["exp_avg"])


def test_names_of_a_checkpoint_are_taken_on_where_there_are_none():
    _, saved = saved_of(["a", "b"])
    optimizer = fusedopt.FusedAdam(make_params([(3,)] * 2), telemetry=1)
    optimizer.load_state_dict(saved)
    assert list(optimizer.telemetry().params) == ["a", "b"]


def test_a_parameter_without_a_name_is_found_at_its_place():
    optimizer, others = fresh(["a", "b"]), fresh(["a", "b"])
    for it in (optimizer, others):
        it.param_groups[0]["params"].append(make_params([(3,)])[0])
        set_grads(it.param_groups[0]["params"], 0)
    others.step()
    optimizer.load_state_dict(others.state_dict())
    assert len(optimizer.state) == 3
