"""A step notices changed gradients, states, parameters, groups and options."""

from __future__ import annotations

import warnings

import pytest
import torch
from cases import (
    CLASSES,
    assert_same_bits,
    make_params,
    set_grads,
    snapshot,
    step_counts,
    tensors_of,
)
from torch.nn import Parameter

import fusedopt

SHAPES = [(33,), (4, 5), (16385,)]


class Pair:
    """Takes steps on a backend and on the reference, which looks everything up at every step."""

    def __init__(
        self, backend, cls=fusedopt.FusedAdam, shapes=SHAPES, dtype=torch.float32, **kwargs
    ):
        self.device = backend.device
        self.params, expected = (make_params(shapes, dtype, backend.device) for _ in range(2))
        self.both = (
            backend.make(cls, self.params, **kwargs),
            cls(expected, backend="reference", **kwargs),
        )
        self.fused = self.both[0]
        self.seed = 0

    def step(self, without=()):
        self.seed += 1
        for optimizer in self.both:
            params = [p for group in optimizer.param_groups for p in group["params"]]
            set_grads(params, self.seed)
            for index in without:
                params[index].grad = None
            optimizer.step()
        assert_same_bits(tensors_of(self.both[0]), tensors_of(self.both[1]))
        assert self.both[0].grad_norm == self.both[1].grad_norm

    def change(self, function):
        """Calls it with each optimizer and its list of parameters."""
        for optimizer in self.both:
            function(optimizer, optimizer.param_groups[0]["params"])


@pytest.mark.parametrize("kwargs", [{}, {"max_grad_norm": 1.0}], ids=str)
@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_missing_and_late_gradients(backend, case, kwargs):
    pair = Pair(backend, case.cls, **case.kwargs, **kwargs)
    for without in ([0, 1, 2], [1], [0], [0, 1, 2], [], [2], []):
        pair.step(without)
    assert set(step_counts(pair.fused)) == {4 if "step" in case.cls.rule.scalars else 1}


def test_gradient_that_is_the_same_tensor_with_new_values(backend):
    pair = Pair(backend)
    pair.step()
    for optimizer in pair.both:
        for p in optimizer.param_groups[0]["params"]:
            p.grad.mul_(3)
        optimizer.step()
    assert_same_bits(tensors_of(pair.both[0]), tensors_of(pair.both[1]))


CHANGES = {
    "new state tensor": lambda o, ps: o.state[ps[1]].update(exp_avg=torch.ones_like(ps[1])),
    "state of another layout": lambda o, ps: o.state[ps[1]].update(
        exp_avg=o.state[ps[1]]["exp_avg"].t().contiguous().t()
    ),
    "state expanded": lambda o, ps: o.state[ps[1]].update(
        exp_avg_sq=ps[1].new_ones(()).expand(4, 5)
    ),
    "step as a number": lambda o, ps: o.state[ps[0]].update(step=7),
    "step of shape (1,)": lambda o, ps: o.state[ps[0]].update(step=torch.full((1,), 7.0)),
    "step in float64": lambda o, ps: o.state[ps[0]].update(step=torch.tensor(7.0).double()),
    "step as an integer": lambda o, ps: o.state[ps[0]].update(step=torch.tensor(7)),
    "state written in place": lambda o, ps: o.state[ps[2]]["exp_avg"].fill_(2.0),
    "data of a state": lambda o, ps: setattr(
        o.state[ps[1]]["exp_avg"], "data", torch.ones_like(ps[1]).detach()
    ),
    "one state deleted": lambda o, ps: o.state.pop(ps[1]),
    "one state emptied": lambda o, ps: o.state[ps[1]].clear(),
    "state cleared": lambda o, ps: o.state.clear(),
    "state replaced": lambda o, ps: setattr(o, "state", {p: dict(s) for p, s in o.state.items()}),
    "state in another order": lambda o, ps: o.state.update({ps[0]: o.state.pop(ps[0])}),
    "keys in another order": lambda o, ps: o.state[ps[0]].update(step=o.state[ps[0]].pop("step")),
    "parameters in another order": lambda o, ps: ps.reverse(),
    "parameter dropped": lambda o, ps: ps.pop(1),
    "parameter replaced": lambda o, ps: ps.__setitem__(1, Parameter(torch.ones_like(ps[1]))),
    "parameters as a tuple": lambda o, ps: o.param_groups[0].update(params=tuple(ps)),
    "data": lambda o, ps: setattr(ps[0], "data", ps[0].data.clone() + 1),
    "data of another layout": lambda o, ps: setattr(ps[1], "data", ps[1].data.t().contiguous().t()),
    "data at an offset": lambda o, ps: setattr(
        ps[0], "data", torch.cat([ps[0].data, ps[0].data])[33:]
    ),
    "data with gaps": lambda o, ps: setattr(ps[0], "data", torch.stack([ps[0].data] * 2, 1)[:, 0]),
    "requires_grad": lambda o, ps: ps[0].requires_grad_(False),
    "lr": lambda o, ps: o.param_groups[0].update(lr=0.3),
    "lr as a tensor": lambda o, ps: o.param_groups[0].update(lr=torch.tensor(0.3)),
    "betas": lambda o, ps: o.param_groups[0].update(betas=[0.5, 0.6]),
    "weight decay": lambda o, ps: o.param_groups[0].update(weight_decay=0.3),
    "integer option": lambda o, ps: o.param_groups[0].update(weight_decay=1),
    "maximize": lambda o, ps: o.param_groups[0].update(maximize=True),
    "decoupled": lambda o, ps: o.param_groups[0].update(
        weight_decay=0.2, decoupled_weight_decay=True
    ),
    "group added": lambda o, ps: o.add_param_group(
        {"params": [Parameter(torch.ones(9, device=ps[0].device))], "lr": 0.2}
    ),
    "user's key": lambda o, ps: o.state[ps[0]].update(mine=torch.ones(2)),
    "user's entry": lambda o, ps: o.state.update(mine=[1]),
    "swapped tensors": lambda o, ps: torch.utils.swap_tensors(
        ps[1], Parameter(torch.full((4, 5), 2.0, device=ps[1].device))
    ),
    "bfloat16": lambda o, ps: [setattr(p, "data", p.data.bfloat16()) or p for p in ps],
}


@pytest.mark.parametrize("change", CHANGES)
def test_change_is_noticed(backend, change):
    pair = Pair(backend)
    pair.step()
    pair.step([0])
    for optimizer in pair.both:
        optimizer.zero_grad()
    pair.change(CHANGES[change])
    pair.step()
    pair.step()


def test_state_that_took_the_place_of_a_freed_one_is_checked(backend):
    """Python and the allocator hand out the same addresses again."""
    pair = Pair(backend, shapes=[(2000,)])
    for make in (lambda: torch.zeros(1990), lambda: torch.zeros(2000, dtype=torch.int32)):
        pair.step()
        state = pair.fused.state[pair.params[0]]
        del state["exp_avg_sq"]
        state["exp_avg_sq"] = make().to(backend.device)
        with pytest.raises((RuntimeError, TypeError), match="'exp_avg_sq' of parameter 0"):
            pair.fused.step()
        state["exp_avg_sq"] = (
            pair.both[1].state[pair.both[1].param_groups[0]["params"][0]]["exp_avg_sq"].clone()
        )


def test_state_transposed_in_place_is_noticed(backend):
    pair = Pair(backend, shapes=[(20, 20)])
    pair.step()
    pair.change(lambda o, ps: o.state[ps[0]]["exp_avg"].t_())
    pair.step()


def test_state_moved_within_its_memory_is_noticed(backend):
    pair = Pair(backend, shapes=[(20,)])
    pair.step()
    memory = [torch.arange(40.0, device=backend.device) for _ in pair.both]

    def move(start):
        for optimizer, whole in zip(pair.both, memory):
            state = optimizer.state[optimizer.param_groups[0]["params"][0]]
            state["exp_avg"].data = whole[start : start + 20]

    for start in (0, 20, 5):
        move(start)
        pair.step()


def test_state_whose_memory_holds_its_negative(backend):
    pair = Pair(backend, shapes=[(20,)])
    pair.step()
    state, expected = (o.state[o.param_groups[0]["params"][0]] for o in pair.both)
    state["exp_avg"] = torch._neg_view(-expected["exp_avg"])
    for optimizer in pair.both:
        optimizer.step()
    assert torch.equal(state["exp_avg"], expected["exp_avg"])
    assert torch.equal(*(o.param_groups[0]["params"][0] for o in pair.both))


def test_subclass_gradient_after_plain_ones_is_refused(backend):
    from test_refusals import Wrapper

    pair = Pair(backend, shapes=[(4, 5)])
    pair.step()
    pair.params[0].grad = Wrapper(torch.ones(5, 4, device=backend.device).t())
    with pytest.raises(TypeError, match="Wrapper"):
        pair.fused.step()


def test_tensor_lr_modified_in_place(backend):
    pair = Pair(backend, lr=torch.tensor(0.1))
    pair.step()
    for optimizer in pair.both:
        optimizer.param_groups[0]["lr"].fill_(0.01)
    pair.step()


def test_data_of_another_shape_is_refused_by_name(backend):
    pair = Pair(backend)
    pair.step()
    pair.params[1].grad = None
    pair.params[1].data = torch.ones(3, 2, device=backend.device)
    pair.params[1].grad = torch.ones(3, 2, device=backend.device)
    before = snapshot(pair.fused)
    with pytest.raises(RuntimeError, match=r"'exp_avg' of parameter 1 of .*\(4, 5\).*\(3, 2\)"):
        pair.fused.step()
    assert_same_bits(tensors_of(pair.fused), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_module_converted_before_the_first_step(backend, dtype):
    model = torch.nn.Linear(5, 4).to(backend.device)
    optimizer = backend.make(fusedopt.FusedAdam, model.parameters())
    model.to(dtype)
    model(torch.ones(2, 5, dtype=dtype, device=backend.device)).sum().backward()
    optimizer.step()
    assert optimizer.state[model.weight]["exp_avg"].dtype == dtype
    assert optimizer.state[model.weight]["step"].dtype == torch.float32


def test_module_converted_to_float64_after_a_step_is_refused_by_name(backend):
    pair = Pair(backend)
    pair.step()
    for p in pair.params:
        p.grad = None
        p.data = p.data.double()
    set_grads(pair.params, 1)
    with pytest.raises(
        TypeError, match=r"'exp_avg' of parameter 0 .*float32; expected torch.float64"
    ):
        pair.fused.step()


def test_parameter_listed_twice_is_updated_once(backend):
    params = make_params(SHAPES, device=backend.device)
    twins = make_params(SHAPES, device=backend.device)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        twice = backend.make(fusedopt.FusedAdam, [params[0], *params], max_grad_norm=1.0)
    once = backend.make(fusedopt.FusedAdam, twins, max_grad_norm=1.0)
    for seed in range(2):
        set_grads(params, seed)
        set_grads(twins, seed)
        twice.step()
        once.step()
    assert twice.grad_norm == once.grad_norm
    assert_same_bits(
        {str(i): p for i, p in enumerate(params)}, {str(i): p for i, p in enumerate(twins)}
    )


def test_group_without_parameters(backend):
    """torch takes one, even as the only one; it may be filled later."""
    backend.make(fusedopt.FusedAdam, [{"params": []}]).step()
    late = make_params([(5,)], device=backend.device)
    rest = make_params([(7,)], device=backend.device)
    optimizer = backend.make(fusedopt.FusedAdam, [{"params": []}, {"params": rest}])
    set_grads([*late, *rest], 0)
    optimizer.step()
    assert optimizer.grad_norm > 0
    optimizer.param_groups[0]["params"].extend(late)
    optimizer.step()
    assert step_counts(optimizer) == [1, 2]


def test_default_dtype_of_float64(backend):
    """The states' dtypes are documented, whatever torch's default is."""
    torch.set_default_dtype(torch.float64)
    try:
        pair = Pair(backend)
        for _ in range(2):
            pair.step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert pair.fused.state[pair.params[0]]["step"].dtype == torch.float32
    assert step_counts(pair.fused) == [2, 2, 2]


def test_lazy_parameters_take_their_shape_later(backend):
    model = torch.nn.LazyLinear(2, device=backend.device)
    optimizer = backend.make(fusedopt.FusedAdam, model.parameters())
    model(torch.ones(1, 3, device=backend.device)).sum().backward()
    optimizer.step()
    assert step_counts(optimizer) == [1, 1]


def test_no_warnings_in_a_plain_run(backend):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pair = Pair(backend, max_grad_norm=1.0)
        pair.step()
        pair.fused.load_state_dict(pair.fused.state_dict())
        pair.step()
