"""A setting takes effect or is refused by name, wherever it is given."""

from __future__ import annotations

import copy
import math
from collections import UserList, deque

import pytest
import torch
from cases import CLASSES, assert_same_bits, make_params, set_grads, snapshot, tensors_of

import fusedopt
from fusedopt.core import check_settings
from fusedopt.core.state import is_new

OURS = {
    "max_grad_norm": 0.5,
    "nonfinite": "skip",
    "backend": "cpu",
    "telemetry": 3,
    "max_consecutive_skips": 3,
    "process_group": "everyone",
    "plain": "own",
    "check_replicas": 2,
}


# ----------------------------------------------------------------------------- Ours in param groups


@pytest.mark.parametrize("key", OURS)
@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_ours_in_a_param_group_are_refused_at_construction_and_when_added(case, key):
    group = {"params": make_params([(3,)]), key: OURS[key]}
    with pytest.raises(ValueError, match=f"param group 0 has '{key}'.*argument of the optimizer"):
        case.cls([group])
    optimizer = case.cls(make_params([(4,)]))
    with pytest.raises(ValueError, match=f"param group 1 has '{key}'"):
        optimizer.add_param_group(dict(group))
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("key", OURS)
def test_ours_set_later_in_a_param_group_are_refused_by_the_next_step(backend, key):
    params = make_params([(3,), (4,)], device=backend.device)
    optimizer = backend.make(fusedopt.FusedAdam, [{"params": p} for p in params])
    set_grads(params, 0)
    optimizer.step()
    before = snapshot(optimizer)
    value = "reference" if key == "backend" else OURS[key]  # not what is asked for anyway
    optimizer.param_groups[1][key] = value
    for _ in range(2):
        with pytest.raises(ValueError, match=f"param group 1 has '{key}'"):
            optimizer.step()
    assert_same_bits(tensors_of(optimizer), before)
    del optimizer.param_groups[1][key]
    optimizer.param_groups[1]["name"] = "a user's"
    optimizer.step()
    assert tensors_of(optimizer)["step 0"] == 2
    del optimizer.param_groups[1]["name"]  # as many keys as before, but another one
    optimizer.param_groups[1][key] = value
    with pytest.raises(ValueError, match=f"param group 1 has '{key}'"):
        optimizer.step()


@pytest.mark.parametrize("key", OURS)
def test_ours_in_a_checkpoints_param_groups_are_refused(key):
    optimizer = fusedopt.FusedAdam(make_params([(3,)]), lr=0.5)
    saved = optimizer.state_dict()
    saved["param_groups"][0].update({key: OURS[key], "lr": 0.1})
    with pytest.raises(ValueError, match=f"param group 0 has '{key}'"):
        optimizer.load_state_dict(saved)
    assert key not in optimizer.param_groups[0] and optimizer.param_groups[0]["lr"] == 0.5


# --------------------------------------------------------------------------------------- Attributes


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("max_gradnorm", "max_grad_norm"),
        ("max_grad_norms", "max_grad_norm"),
        ("maxgradnorm", "max_grad_norm"),
        ("non_finite", "nonfinite"),
        ("max_consecutive_skip", "max_consecutive_skips"),
    ],
)
def test_setting_with_a_typo_is_refused(name, meant):
    optimizer = fusedopt.FusedAdam(make_params([(3,)]))
    with pytest.raises(AttributeError, match=f"no {name}; did you mean {meant}"):
        setattr(optimizer, name, 1.0)
    assert not hasattr(optimizer, name)


@pytest.mark.parametrize("name", ["telemetry", "backend"])
def test_what_holds_for_good_is_not_set_later(name):
    optimizer = fusedopt.FusedAdam(make_params([(3,)]), telemetry=4)
    with pytest.raises(AttributeError, match=f"{name} is an argument of FusedAdam"):
        setattr(optimizer, name, 10)
    assert optimizer.telemetry().params and optimizer._backend is None


def test_attributes_of_others_can_be_set():
    optimizer = fusedopt.FusedAdam(make_params([(3,)]))
    for name in ("name", "model", "lr", "max_norm", "scaler", "_max_grad_norm", "grad_norms"):
        setattr(optimizer, name, 3)
        assert getattr(optimizer, name) == 3
    optimizer.step = optimizer.step  # as schedulers do
    optimizer.telemetry = optimizer.telemetry


def test_repr_shows_ours():
    optimizer = fusedopt.FusedAdamW(make_params([(3,)]), max_grad_norm=0.5, telemetry=7)
    text = repr(optimizer)
    assert text.startswith("FusedAdamW (\nParameter Group 0\n    amsgrad: False\n")
    assert text.endswith(
        "    weight_decay: 0.01\nmax_grad_norm: 0.5\nnonfinite: None\nbackend: None\ntelemetry: 7\n"
        "max_consecutive_skips: None\n)"
    )


@pytest.mark.parametrize("steps", [2**31, 2**40, 2**70])
def test_more_telemetry_than_can_be_counted(steps):
    with pytest.raises(
        ValueError, match=rf"telemetry value: {steps}; expected .* up to {2**31 - 1}"
    ):
        fusedopt.FusedAdam(make_params([(3,)]), telemetry=steps)


def test_more_telemetry_than_memory():
    params = make_params([(3,)] * 100_000)
    optimizer = fusedopt.FusedAdam(params, telemetry=2**31 - 1)
    params[0].grad = torch.ones(3)
    with pytest.raises(
        RuntimeError, match=r"telemetry=2147483647 keeps 10,307,\S+ bytes for 100000"
    ):
        optimizer.step()
    assert not optimizer.state


# ------------------------------------------------------------------------------------------- Limits


def test_limits_that_are_almost_surely_mistaken():
    with pytest.raises(TypeError, match="positional"):
        fusedopt.clip.ZScore(1.0)
    for fraction in (0.9, 0.99, 1e-9):
        with pytest.raises(
            ValueError, match=rf"{fraction}; expected from 1 to 100.*{fraction * 100:g}"
        ):
            fusedopt.clip.Percentile(fraction)
    assert fusedopt.clip.Percentile(0).percentile == 0 and fusedopt.clip.Percentile(1)


# ----------------------------------------------------------------------- Options that torch refuses

OUT_OF_RANGE = [
    ({"lr": -1.0}, "Invalid learning rate: -1.0"),
    ({"lr": math.nan}, "Invalid learning rate: nan"),
    ({"lr": torch.tensor(-2.0)}, "Invalid learning rate: -2.0"),
    ({"betas": (2, 0.5)}, "Invalid beta parameter at index 0: 2"),
    ({"betas": (0.5, 1.0)}, "Invalid beta parameter at index 1: 1.0"),
    ({"betas": [-0.1, 0.9]}, "Invalid beta parameter at index 0: -0.1"),
    ({"eps": -1e-8}, "Invalid epsilon value: -1e-08"),
    ({"weight_decay": -0.1}, "Invalid weight_decay value: -0.1"),
    ({"momentum": -0.1}, "Invalid momentum value: -0.1"),
    ({"alpha": -0.5}, "Invalid alpha value: -0.5"),
    ({"momentum_decay": -1}, "Invalid momentum_decay value: -1"),
]


def cases_with(options):
    """The classes that have these options, with so many numbers, and refuse them if negative."""
    return [
        case
        for case in CLASSES
        if options.keys() <= case.cls([torch.zeros(1)]).defaults.keys()
        and not options.keys() & {*case.cls.rule.any_sign}
        and ("betas" not in options or case.cls.rule.counts["betas"] == len(options["betas"]))
    ]


@pytest.mark.parametrize(
    ("case", "options", "words"),
    [(case, *it) for it in OUT_OF_RANGE for case in cases_with(it[0])],
    ids=str,
)
def test_option_out_of_range(backend, case, options, words):
    params = make_params([(3,), (4,)], device=backend.device)
    groups = [{"params": p} for p in params]
    optimizer = backend.make(case.cls, groups, **case.kwargs)
    set_grads(params, 0)
    optimizer.step()
    before = snapshot(optimizer)
    kept = dict(optimizer.param_groups[1])
    optimizer.param_groups[1].update(options)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"param group 1: {words}; expected"):
            optimizer.step()
    optimizer.param_groups[1].update(kept)
    with pytest.raises(ValueError, match=f"param group 2: {words}; expected"):
        optimizer.add_param_group({"params": make_params([(1,)]), **options})
    assert_same_bits(tensors_of(optimizer), before)
    assert len(optimizer.param_groups) == 2
    optimizer.step()


def test_options_at_the_ends_of_their_ranges(backend):
    params = make_params([(3,)], device=backend.device)
    optimizer = backend.make(fusedopt.FusedAdam, params, amsgrad=True)
    optimizer.param_groups[0].update(lr=0.0, betas=(0.0, 0.0), eps=0, weight_decay=0.0)
    set_grads(params, 0)
    optimizer.step()
    sgd = backend.make(fusedopt.FusedSGD, params, momentum=0.9)
    sgd.param_groups[0].update(dampening=-0.5, lr=torch.tensor(0.0))
    sgd.step()


@pytest.mark.parametrize("betas", [(0.9, 0.95, 0.99), [0.9, 0.95, 0.99], deque([0.9] * 3)], ids=str)
@pytest.mark.parametrize("cls", [fusedopt.FusedAdam, fusedopt.FusedAdamW, fusedopt.FusedNAdam])
def test_three_betas_are_refused_at_construction(cls, betas):
    with pytest.raises(ValueError, match=r"betas is .* expected 2 numbers"):
        cls(make_params([(3,)]), betas=betas)
    with pytest.raises(ValueError, match=r"param group 0's betas is .* expected 2 numbers"):
        cls([{"params": make_params([(3,)]), "betas": betas}])


# ---------------------------------------------------------------------------- Sequences of any type


def omegaconfs(values):
    return pytest.importorskip("omegaconf").OmegaConf.create(list(values))


SEQUENCES = [list, deque, UserList, torch.tensor, omegaconfs]


@pytest.mark.parametrize("sequence", SEQUENCES, ids=lambda it: it.__name__)
@pytest.mark.parametrize("how", ["argument", "group", "added", "later"])
@pytest.mark.parametrize("cls", [fusedopt.FusedAdamW, fusedopt.FusedNAdam])
def test_betas_of_any_sequence_type(backend, cls, how, sequence):
    values = (0.5, 0.75)
    params, twins = (make_params([(3,)], device=backend.device) for _ in range(2))
    betas = sequence(values)
    if how == "argument":
        optimizer = backend.make(cls, params, betas=betas)
    elif how == "group":
        optimizer = backend.make(cls, [{"params": params, "betas": betas}])
    elif how == "added":
        optimizer = backend.make(cls, make_params([(2,)], device=backend.device))
        optimizer.add_param_group({"params": params, "betas": betas})
    else:
        optimizer = backend.make(cls, params)
        optimizer.param_groups[0]["betas"] = betas
    twin = backend.make(cls, twins, betas=values)
    for seed in range(3):
        for its, one in ((params, optimizer), (twins, twin)):
            set_grads(its, seed)
            one.step()
        if how == "later":
            optimizer.param_groups[0]["betas"] = sequence(values)
    assert torch.equal(params[0], twins[0])
    if how != "later":
        assert type(optimizer.param_groups[-1]["betas"]) in (tuple, list)
        assert type(optimizer.defaults["betas"]) in (tuple, list)


def lists_of(kind, params):
    if kind == "ParameterList":
        return torch.nn.ParameterList(params)
    if kind == "values":
        return dict(enumerate(params)).values()
    return {"deque": deque, "tuple": tuple, "UserList": UserList}[kind](params)


@pytest.mark.parametrize("kind", ["ParameterList", "values", "deque", "tuple", "UserList"])
@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_parameters_of_a_group_in_any_list(backend, kind, nonfinite):
    params, twins = (make_params([(3,), (4,)], device=backend.device) for _ in range(2))
    limit = fusedopt.clip.PerTensor(warmup=1)
    options = {"max_grad_norm": limit, "nonfinite": nonfinite, "telemetry": 4}
    optimizer = backend.make(fusedopt.FusedAdam, params, **options)
    optimizer.param_groups[0]["params"] = lists_of(kind, params)
    twin = backend.make(fusedopt.FusedAdam, twins, **options)
    for seed in range(3):
        for its, one in ((params, optimizer), (twins, twin)):
            set_grads(its, seed)
            one.step()
    assert_same_bits(dict(zip("ab", params)), dict(zip("ab", twins)))
    assert optimizer.explain() == twin.explain()
    params[1].grad[0] = math.nan
    if nonfinite == "raise":
        with pytest.raises(fusedopt.NonFiniteGradientError, match="parameter 1 of param group 0"):
            optimizer.step()
    else:
        optimizer.step()
    assert optimizer.step_skipped
    optimizer.load_state_dict(optimizer.state_dict())
    copy.deepcopy(optimizer).step()


def test_groups_in_a_tuple(backend):
    params = make_params([(3,), (4,)], device=backend.device)
    optimizer = backend.make(fusedopt.FusedAdam, [{"params": p} for p in params])
    before = snapshot(optimizer)
    optimizer.param_groups = tuple(optimizer.param_groups)
    for seed in range(2):
        set_grads(params, seed)
        optimizer.step()
    assert tensors_of(optimizer)["step 1"] == 2
    assert not torch.equal(params[0], before["param 0"])


# ------------------------------------------------------------------------ A user's own in the state


@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_users_items_in_a_state_that_has_yet_to_begin(backend, case):
    params, twins = (make_params([(3,), (4,)], device=backend.device) for _ in range(2))
    optimizer = backend.make(case.cls, params, nonfinite="skip", **case.kwargs)
    twin = backend.make(case.cls, twins, nonfinite="skip", **case.kwargs)
    mask = torch.ones(2)
    its_state = optimizer.state[params[0]]
    its_state["mask"] = mask
    for seed, scale in enumerate([math.inf, 1.0, 1.0]):
        for its, one in ((params, optimizer), (twins, twin)):
            set_grads(its, seed, scale)
            one.step()
        assert optimizer.state[params[0]] is its_state and its_state["mask"] is mask
        assert optimizer.state_dict()["state"][0]["mask"] is mask
    assert all(torch.equal(*pair) for pair in zip(params, twins))
    expected = {"mask", *twin.state[twins[0]]}
    assert set(its_state) == expected


# Adagrad's constructor makes the state, as torch's.
LATE_STATE = [case for case in CLASSES if case.cls is not fusedopt.FusedAdagrad]


@pytest.mark.parametrize("case", LATE_STATE, ids=str)
def test_users_items_alone_are_saved_and_loaded(case):
    optimizers = [case.cls(make_params([(3,), (4,)]), **case.kwargs) for _ in range(2)]
    first = optimizers[0].param_groups[0]["params"][0]
    optimizers[0].state[first]["mask"] = torch.ones(2)
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    params = optimizers[1].param_groups[0]["params"]
    assert list(optimizers[1].state[params[0]]) == ["mask"]
    set_grads(params, 0)
    optimizers[1].step()
    names = [*optimizers[1].state.get(params[1], {})]
    assert list(optimizers[1].state[params[0]]) == ["mask", *names]


def test_users_items_stay_where_the_host_does_not_know_of_a_skip():
    params = make_params([(3,)])
    optimizer = fusedopt.FusedAdam(params, nonfinite="skip")
    optimizer.state[params[0]]["mask"] = torch.ones(2)
    set_grads(params, 0)
    optimizer._provisional_state.add(optimizer._prepare()[1])
    assert list(optimizer.state_dict()["state"][0]) == ["mask"]
    optimizer.step()
    assert set(optimizer.state_dict()["state"][0]) == {"mask", "step", "exp_avg", "exp_avg_sq"}


def test_state_of_another_class_is_not_a_users():
    params = make_params([(3,)])
    optimizer = fusedopt.FusedAdam(params)
    optimizer.state[params[0]]["momentum_buffer"] = torch.zeros(3)
    set_grads(params, 0)
    with pytest.raises(RuntimeError, match=r"has no 'step'.*another optimizer's"):
        optimizer.step()


def test_a_new_rules_states_are_not_a_users():
    rule = fusedopt.reference.Rule(
        "new", {"age": 0}, ("trace",), advance=lambda *_: {}, update=lambda *_: (torch.ones(1), {})
    )
    assert rule.states({}) == ("trace",)
    assert is_new({"mask": 1, "trace": None}) and not is_new({"trace": torch.ones(1)})
    assert not is_new({"age": 0})


def test_the_names_of_our_settings():
    assert set(check_settings.OURS) == set(OURS)
