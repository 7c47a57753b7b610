"""A step's look at sharded parameters: compiled and in Python it finds the same."""

import over_ranks
import torch
from rank_tensors import placed, set_grads, sharded
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from fusedopt.core import backends
from fusedopt.distributed import LocalView


def make(mesh):
    params = sharded(mesh, [Shard(0)])
    plain = torch.nn.Parameter(torch.zeros(3))
    groups = [{"params": params[:3], "lr": 0.1}, {"params": [*params[3:], plain]}]
    state = {
        param: {"step": torch.zeros(()), "exp_avg": torch.zeros_like(param)} for param in params
    }
    return groups, {**state, "a user's": 1}


def changes(mesh):
    """Each changes one thing that a view is made of."""

    def replace_local(groups, state):
        groups[0]["params"][1]._local_tensor = torch.zeros(3)

    def replace_param(groups, state):
        groups[1]["params"][-1] = torch.nn.Parameter(torch.zeros(3))

    def append_param(groups, state):
        groups[0]["params"].append(torch.nn.Parameter(torch.zeros(3)))

    def replace_state(groups, state):
        state[groups[0]["params"][2]]["exp_avg"] = placed(torch.zeros(7, 3), mesh, [Shard(0)])

    def replace_local_state(groups, state):
        state[groups[0]["params"][2]]["exp_avg"]._local_tensor = torch.zeros(7, 3)

    def replace_entry(groups, state):
        state[groups[0]["params"][0]] = dict(state[groups[0]["params"][0]])

    def add_name(groups, state):
        state[groups[0]["params"][0]]["more"] = 2

    def rename(groups, state):
        entry = state[groups[0]["params"][0]]
        entry["other"] = entry.pop("more")

    def drop_state(groups, state):
        state.pop(groups[0]["params"][0])

    def replace_group(groups, state):
        groups[1] = dict(groups[1])

    def drop_group(groups, state):
        groups.pop()

    return [it for it in locals().values() if callable(it)]


def every_change_is_seen(mesh, compiled):
    view, (groups, state) = LocalView(lambda: compiled), make(mesh)
    assert not view.look(groups, state, {})
    for change in changes(mesh):
        assert view.look(groups, state, {})
        change(groups, state)
        assert not view.look(groups, state, {}), change.__name__
        listed = [getattr(it, "_local_tensor", it) for g in groups for it in g["params"]]
        seen = [it for group in view.groups for it in group["params"]]
        assert all(a is b for a, b in zip(seen, listed, strict=True))


def gradients_are_lent(mesh, compiled):
    view, (groups, state) = LocalView(lambda: compiled), make(mesh)
    view.look(groups, state, {})
    params = groups[0]["params"] + groups[1]["params"][:2]
    announced = []
    for step in range(3):
        set_grads(params, step)
        params[step].grad = None
        view.take_grads(groups, lambda failed, meshes: announced.append(failed))
        for param in params:
            local = param.grad if param.grad is None else param.grad._local_tensor
            assert (param._local_tensor.grad is None) == (local is None)
            assert local is None or torch.equal(param._local_tensor.grad, local)
        view.end()
        assert all(param._local_tensor.grad is None for param in params)
    assert not announced
    params[0].grad = DTensor.from_local(torch.ones(5), mesh, [Partial()])
    view.take_grads(groups, lambda failed, meshes: announced.append(failed))
    assert torch.equal(params[0]._local_tensor.grad, torch.ones(5))
    view.end()
    set_grads(params, 0)
    view.take_grads(groups, lambda failed, meshes: announced.append(failed))
    view.end()
    replicated = placed(torch.ones(5), mesh, [Replicate()])
    params[0].grad = replicated
    view.take_grads(groups, lambda failed, meshes: announced.append(failed))
    view.end()
    assert announced == [False, False]
    not_a_dtensor = torch.nn.Parameter(torch.ones(3))
    not_a_dtensor.grad = torch.ones(3)
    groups[1]["params"] = [not_a_dtensor]
    assert not view.look(groups, state, {})
    view.take_grads(groups, lambda failed, meshes: announced.append(failed))
    assert torch.equal(not_a_dtensor.grad, torch.ones(3))
    view.end()
    assert torch.equal(not_a_dtensor.grad, torch.ones(3))


def both_ways(rank):
    mesh = init_device_mesh("cpu", (1,))
    for compiled in (backends._C, None):
        every_change_is_seen(mesh, compiled)
        gradients_are_lent(mesh, compiled)


def test_it_sees_every_change_and_lends_gradients():
    over_ranks.run(both_ways, 1)
