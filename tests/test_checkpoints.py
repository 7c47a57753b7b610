"""Checkpoints and copies of an optimizer, torch's and ours."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from cases import CASES, CLASSES, assert_same_bits, make_params, set_grads, tensors_of

import fusedopt
from fusedopt.core.checks import IMPLEMENTATION

SHAPES = [(33,), (4, 5), (16385,)]


def train(optimizer, seeds):
    for seed in seeds:
        set_grads([p for group in optimizer.param_groups for p in group["params"]], seed)
        optimizer.step()


def tensors_kept_by_torch(optimizer):
    """All but NAdam's and ASGD's numbers, which torch casts to the parameter's dtype on loading."""
    cast = ("mu_product", "eta", "mu")
    return {k: v for k, v in tensors_of(optimizer).items() if k.split()[0] not in cast}


# On a GPU torch's own says so of every step outside a graph.
@pytest.mark.filterwarnings("ignore:This instance was constructed with capturable=True:UserWarning")
@pytest.mark.parametrize(
    "flags", [{}, {"foreach": True}, {"fused": True}, {"capturable": True}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_checkpoint_of_torch_and_back(backend, case, dtype, flags):
    refused = flags.keys() - inspect.signature(case.twin).parameters.keys()
    if refused:
        pytest.skip(f"torch's {case.twin.__name__} has no {refused}")
    if "capturable" in flags and backend.device == "cpu":
        flags = {}  # torch refuses it here: only the states' device is of interest
    twins = make_params(SHAPES, dtype, backend.device)
    twin = case.twin(twins, **case.kwargs, **flags)
    train(twin, range(2))
    params = [p.detach().clone().requires_grad_() for p in twins]
    fused = backend.make(case.cls, params)
    fused.load_state_dict(copy.deepcopy(twin.state_dict()))
    assert_same_bits(tensors_kept_by_torch(fused), tensors_kept_by_torch(twin))
    train(fused, [2])
    train(twin, [2])
    if dtype == torch.float32:  # of 16 bits, torch rounds every operation
        torch.testing.assert_close(tensors_of(fused), tensors_of(twin), rtol=1e-3, atol=1e-5)

    back = case.twin([p.detach().clone().requires_grad_() for p in params])
    back.load_state_dict(copy.deepcopy(fused.state_dict()))  # torch's keeps the tensors
    assert_same_bits(tensors_kept_by_torch(back), tensors_kept_by_torch(fused))
    assert back.state_dict().keys() == fused.state_dict().keys() == twin.state_dict().keys()
    assert fused.param_groups[0].keys() == twin.param_groups[0].keys()
    train(back, [3])
    train(fused, [3])
    if dtype == torch.float32:
        torch.testing.assert_close(tensors_of(back), tensors_of(fused), rtol=1e-3, atol=1e-5)


NUMBERS = {
    "int": int,
    "float": float,
    "int64": lambda value: torch.tensor(int(value)),
    "float64": lambda value: value.double().cpu(),
    "float32 of shape (1,)": lambda value: value.reshape(1),
}


@pytest.mark.parametrize("kind", NUMBERS)
@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_numbers_as_older_checkpoints_have_them(backend, case, kind):
    """Of whole numbers only the step can be one."""
    params = make_params(SHAPES, device=backend.device)
    optimizer = backend.make(case.cls, params)
    train(optimizer, range(3))
    checkpoint = copy.deepcopy(optimizer.state_dict())
    for state in checkpoint["state"].values():
        for key in case.cls.rule.scalars:
            if "int" not in kind or key == "step":
                state[key] = NUMBERS[kind](state[key])
    others = [p.detach().clone().requires_grad_() for p in params]
    again = backend.make(case.cls, others)
    again.load_state_dict(checkpoint)
    assert_same_bits(tensors_of(again), tensors_of(optimizer))
    train(optimizer, [3])
    train(again, [3])
    assert_same_bits(tensors_of(again), tensors_of(optimizer))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_checkpoint_without_the_options_of_later_versions(case):
    """What torch's own class fills in, it fills in here."""
    newer = {"maximize", "foreach", "capturable", "differentiable", "fused", "nesterov"}
    newer |= {"amsgrad", "centered", "decoupled_weight_decay"}
    twin = case.twin(make_params(SHAPES), **case.kwargs)
    train(twin, range(2))
    checkpoint = copy.deepcopy(twin.state_dict())
    for key in newer & twin.defaults.keys():
        del checkpoint["param_groups"][0][key]
    fused = case.cls(make_params(SHAPES), **case.kwargs)
    twin.load_state_dict(copy.deepcopy(checkpoint))
    fused.load_state_dict(checkpoint)
    ours, theirs = (
        {k: v for k, v in o.param_groups[0].items() if k not in ("params", *IMPLEMENTATION)}
        for o in (fused, twin)
    )
    assert ours == theirs
    train(fused, [2])


@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_how_a_step_is_implemented_is_not_a_checkpoints_to_say(case):
    there = [flag for flag in IMPLEMENTATION if flag in case.twin([torch.zeros(1)]).defaults]
    source = case.cls(make_params(SHAPES))
    train(source, [0])
    checkpoint = source.state_dict()
    checkpoint["param_groups"][0] |= dict.fromkeys(IMPLEMENTATION, True)
    for own in ({}, {"foreach": True}):
        optimizer = case.cls(make_params(SHAPES), **own)
        before = {flag: optimizer.param_groups[0][flag] for flag in there}
        optimizer.load_state_dict(checkpoint)
        assert {flag: optimizer.param_groups[0][flag] for flag in there} == before
        assert optimizer.param_groups[0].keys() == {"params", *optimizer.defaults}
        train(optimizer, [1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_state_in_float32_stays_so_beside_16_bits(backend, case, dtype):
    source = backend.make(case.cls, make_params(SHAPES, device=backend.device), **case.kwargs)
    train(source, range(2))
    params = make_params(SHAPES, dtype, backend.device)
    optimizer = backend.make(case.cls, params, **case.kwargs)
    optimizer.load_state_dict(source.state_dict())
    assert_same_bits(states_alone(optimizer), states_alone(source))
    train(optimizer, [2])
    assert all(p.dtype == dtype for p in params)
    assert {t.dtype for t in states_alone(optimizer).values()} <= {torch.float32}


@pytest.mark.parametrize(
    ("saved", "dtype", "expected"),
    [
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.float64, torch.float64),
        (torch.float64, torch.float32, torch.float32),
        (torch.float64, torch.bfloat16, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_state_of_a_model_of_another_dtype(case, saved, dtype, expected):
    source = case.cls(make_params(SHAPES, saved), **case.kwargs)
    train(source, range(2))
    optimizer = case.cls(make_params(SHAPES, dtype), **case.kwargs)
    optimizer.load_state_dict(source.state_dict())
    shaped = {k: v for k, v in states_alone(optimizer).items() if v.dim() > 0}
    assert {value.dtype for value in shaped.values()} <= {expected}
    for name, value in shaped.items():
        assert torch.equal(value, tensors_of(source)[name].to(expected))
    train(optimizer, [2])


def test_state_that_mixes_dtypes_is_loaded_in_the_wider_one():
    case = next(case for case in CASES if len(case.cls.rule.states(defaults_of(case))) > 1)
    names = case.cls.rule.states(defaults_of(case))
    source = case.cls(make_params(SHAPES, torch.bfloat16), **case.kwargs)
    train(source, [0])
    checkpoint = source.state_dict()
    checkpoint["state"][1][names[0]] = checkpoint["state"][1][names[0]].float()
    params = make_params(SHAPES, torch.bfloat16)
    optimizer = case.cls(params, **case.kwargs)
    optimizer.load_state_dict(checkpoint)
    found = [{optimizer.state[p][name].dtype for name in names} for p in params]
    assert found == [{torch.bfloat16}, {torch.float32}, {torch.bfloat16}]
    train(optimizer, [1])


def defaults_of(case):
    return case.cls([torch.zeros(1)], **case.kwargs).param_groups[0]


def states_alone(optimizer):
    return {k: v for k, v in tensors_of(optimizer).items() if not k.startswith("param ")}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loaded_state_is_laid_out_as_its_parameter(backend, case):
    source = backend.make(case.cls, make_params(SHAPES, device=backend.device), **case.kwargs)
    train(source, range(2))
    before = {name: value.clone() for name, value in states_alone(source).items()}
    params = make_params(SHAPES, device=backend.device)
    params[1].data = params[1].data.t().contiguous().t()
    optimizer = backend.make(case.cls, params, **case.kwargs)
    optimizer.load_state_dict(copy.deepcopy(source.state_dict()))
    assert_same_bits(states_alone(optimizer), before)
    for name in case.cls.rule.states(optimizer.param_groups[0]):
        assert optimizer.state[params[1]][name].stride() == params[1].stride()
    train(optimizer, [2])
    assert_same_bits(states_alone(source), before)


def test_hooks_run_in_torchs_order_and_may_change_the_checkpoint():
    seen = {}
    for make in (torch.optim.Adam, fusedopt.FusedAdam):
        calls = seen[make] = []
        source = make(make_params(SHAPES), lr=0.5)
        train(source, [0])
        optimizer = make(make_params(SHAPES))

        def first(o, state_dict, calls=calls):
            calls.append(("first", sorted(state_dict), o.param_groups[0]["lr"]))
            return {**state_dict, "mine": 1}

        def second(o, state_dict, calls=calls):
            calls.append(("second", sorted(state_dict), o.param_groups[0]["lr"]))
            state_dict["param_groups"] = [{**state_dict["param_groups"][0], "lr": 0.25}]

        def after(o, calls=calls):
            state = o.state[o.param_groups[0]["params"][0]]
            calls.append(("after", o.param_groups[0]["lr"], int(state["step"])))

        optimizer.register_load_state_dict_pre_hook(second)
        optimizer.register_load_state_dict_pre_hook(first, prepend=True)
        optimizer.register_load_state_dict_post_hook(after)
        source.register_state_dict_pre_hook(lambda o, calls=calls: calls.append(("saving",)))
        source.register_state_dict_post_hook(lambda o, d, calls=calls: {**d, "hooked": True})
        checkpoint = source.state_dict()
        optimizer.load_state_dict(checkpoint)
        assert checkpoint["param_groups"][0]["lr"] == 0.5
    assert seen[torch.optim.Adam] == seen[fusedopt.FusedAdam]
    assert [call[0] for call in seen[fusedopt.FusedAdam]] == ["saving", "first", "second", "after"]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_checkpoint_needs_no_code_to_be_read(case, tmp_path):
    optimizer = case.cls(make_params(SHAPES), max_grad_norm=1.0, **case.kwargs)
    train(optimizer, range(2))
    torch.save(optimizer.state_dict(), tmp_path / "checkpoint.pt")
    again = case.cls(make_params(SHAPES), max_grad_norm=1.0, **case.kwargs)
    again.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    assert_same_bits(states_alone(again), states_alone(optimizer))


def test_lazy_parameters_are_loaded_before_they_have_a_shape():
    models = [torch.nn.LazyLinear(2) for _ in range(2)]
    both = [fusedopt.FusedAdam(model.parameters()) for model in models]
    models[0](torch.ones(1, 3)).sum().backward()
    both[0].step()
    both[1].load_state_dict(both[0].state_dict())
    models[1](torch.ones(1, 3))
    models[1].load_state_dict(models[0].state_dict())
    for model, optimizer in zip(models, both):
        optimizer.zero_grad()
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    assert_same_bits(tensors_of(both[0]), tensors_of(both[1]))


def test_checkpoint_loaded_in_mid_training(backend):
    params = make_params(SHAPES, device=backend.device)
    optimizer = backend.make(fusedopt.FusedAdam, params, max_grad_norm=1.0)
    train(optimizer, range(2))
    checkpoint = copy.deepcopy(optimizer.state_dict())
    values = [p.detach().clone() for p in params]
    train(optimizer, [2, 3])
    expected = {name: value.clone() for name, value in tensors_of(optimizer).items()}
    with torch.no_grad():
        for p, value in zip(params, values):
            p.copy_(value)
    optimizer.load_state_dict(checkpoint)
    assert optimizer.max_grad_norm == 1.0
    train(optimizer, [2, 3])
    assert_same_bits(tensors_of(optimizer), expected)


def test_users_keys_survive_steps_and_checkpoints(backend):
    params = make_params(SHAPES, device=backend.device)
    optimizer = backend.make(fusedopt.FusedAdam, params)
    train(optimizer, [0])
    optimizer.state[params[0]]["extra"] = {"a": 1}
    optimizer.state[params[1]][3] = torch.ones(2)
    train(optimizer, [1])
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(optimizer, [2])
    assert optimizer.state[params[0]]["extra"] == {"a": 1}
    assert torch.equal(optimizer.state[params[1]][3].cpu(), torch.ones(2))


def continues_equally(original, other, params, other_params):
    for seed in (11, 12):
        set_grads(params, seed)
        set_grads(other_params, seed)
        original.step()
        other.step()
    assert_same_bits(tensors_of(original), tensors_of(other))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_copy_keeps_all_and_goes_on_alike(backend, case, copied):
    params = make_params(SHAPES, device=backend.device)
    original = backend.make(case.cls, params, max_grad_norm=0.5, nonfinite="skip", **case.kwargs)
    set_grads(params, 0)
    original.step()
    params[0].grad[3] = float("nan")
    original.step()
    again = copied(original)
    assert (again.max_grad_norm, again.nonfinite) == (0.5, "skip")
    assert again._backend == original._backend
    assert again.skipped_steps == 1 and again.step_skipped
    others = again.param_groups[0]["params"]
    assert others[0] is not params[0]
    continues_equally(original, again, params, others)
    with pytest.raises(ValueError, match="max_grad_norm"):
        again.max_grad_norm = -1


def test_copy_before_the_first_step(backend):
    params = make_params(SHAPES, device=backend.device)
    original = backend.make(fusedopt.FusedAdam, params, nonfinite="raise")
    again = copy.deepcopy(original)
    continues_equally(original, again, params, again.param_groups[0]["params"])


@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_group_added_in_mid_training_keeps_all(backend, case):
    params = make_params(SHAPES, device=backend.device)
    optimizer = backend.make(case.cls, params, max_grad_norm=0.5, nonfinite="skip")
    train(optimizer, [0])
    params[0].grad[0] = float("nan")
    optimizer.step()
    before = states_alone(optimizer)
    late = make_params([(6,)], device=backend.device)
    optimizer.add_param_group({"params": late, "lr": 0.5})
    assert (optimizer.max_grad_norm, optimizer.nonfinite) == (0.5, "skip")
    assert optimizer.skipped_steps == 1 and optimizer.step_skipped
    assert all(value is states_alone(optimizer)[name] for name, value in before.items())
    train(optimizer, [1])
    assert not late[0].equal(make_params([(6,)], device=backend.device)[0])
