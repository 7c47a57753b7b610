"""torch's wrappers of models and optimizers: DDP, ZeRO, averages, parametrizations, hooks."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from cases import CLASSES, assert_same_bits, make_params, same_bits, set_grads, tensors_of
from torch.nn.parallel import DistributedDataParallel

import fusedopt


def make_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2))


def backward(model, seed):
    data = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))
    model(data).square().sum().backward()


def assert_same_models(a, b):
    assert all(same_bits(*pair) for pair in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_an_optimizer_per_parameter_that_steps_within_backward(case):
    model, twin = make_model(), make_model()
    within = {p: case.cls([p], max_grad_norm=0.1) for p in model.parameters()}
    after = [case.cls([p], max_grad_norm=0.1) for p in twin.parameters()]

    def step(param):
        within[param].step()
        within[param].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    for seed in range(3):
        backward(model, seed)
        backward(twin, seed)
        assert all(p.grad is None for p in model.parameters())
        for optimizer in after:
            optimizer.step()
            optimizer.zero_grad()
    assert_same_models(model, twin)


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_module_converted_between_steps(case, swap):
    """State stays in float32; to which parameter it belongs is not lost."""
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        model = make_model()
        optimizer = case.cls(model.parameters(), lr=0.05)
        for seed, dtype in enumerate([torch.float32, torch.bfloat16, torch.float16, torch.float32]):
            optimizer.zero_grad()
            model.to(dtype)
            data = torch.ones(1, 4, dtype=dtype) * (seed + 1)
            model(data).sum().backward()
            before = [p.detach().clone() for p in model.parameters()]
            optimizer.step()
            assert not all(p.equal(old) for p, old in zip(model.parameters(), before))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    for p in model.parameters():
        assert {value.dtype for value in optimizer.state.get(p, {}).values()} <= {torch.float32}


@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_layers_frozen_and_thawed(case):
    model, twin = make_model(), make_model()
    optimizer, twin_optimizer = case.cls(model.parameters()), case.twin(twin.parameters())
    for step in range(6):
        for network, o in ((model, optimizer), (twin, twin_optimizer)):
            network[0].requires_grad_(step % 2 == 0)
            o.zero_grad()
            backward(network, step)
            o.step()
        assert (model[0].weight.grad is None) == (step % 2 == 1)
    torch.testing.assert_close(tensors_of(optimizer), tensors_of(twin_optimizer))


def as_other_tensor(p):
    p.grad = p.grad.clone()


def as_view(p):
    p.grad = torch.stack([p.grad, p.grad])[1]


def as_expanded(p):
    p.grad = p.grad.flatten()[:1].expand(p.numel()).view_as(p)


def in_other_storage(p):
    values = p.grad.clone()
    p.grad.set_(torch.cat([values.flatten()] * 2).untyped_storage(), p.numel(), p.shape)


def as_data(p):
    p.grad.data = p.grad.data.clone() * 2


@pytest.mark.parametrize(
    "change", [as_other_tensor, as_view, as_expanded, in_other_storage, as_data]
)
def test_gradient_assigned_anew(backend, change):
    params, twins = (make_params([(33,), (4, 5)], device=backend.device) for _ in range(2))
    fused = backend.make(fusedopt.FusedAdam, params, max_grad_norm=1.0)
    reference = fusedopt.FusedAdam(twins, max_grad_norm=1.0, backend="reference")
    for seed in range(3):
        for optimizer in (fused, reference):
            of_these = optimizer.param_groups[0]["params"]
            set_grads(of_these, seed)
            for p in of_these[seed % 2 :]:
                change(p)
            optimizer.step()
        assert_same_bits(tensors_of(fused), tensors_of(reference))


@pytest.mark.parametrize("backend_name", [None, "reference"])
def test_steps_in_and_out_of_inference_mode(backend_name):
    param = torch.nn.Parameter(torch.zeros(5))
    optimizer = fusedopt.FusedAdam([param], max_grad_norm=1.0, backend=backend_name)
    param.grad = torch.ones(5)
    with torch.inference_mode():
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()
    optimizer.step()
    assert optimizer.grad_norm > 0 and optimizer.state[param]["step"] == 3
    with torch.inference_mode():
        param = torch.zeros(5)
        optimizer = fusedopt.FusedAdam([param], backend=backend_name)
        param.grad = torch.ones(5)
        optimizer.step()
        optimizer.step()
    assert (param < 0).all() and param.is_inference()


def test_functional_call():
    model = make_model()
    params = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    optimizer = fusedopt.FusedAdam(params.items(), max_grad_norm=1.0)
    losses = []
    for _ in range(3):
        loss = torch.func.functional_call(model, params, torch.ones(2, 4)).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    grads = torch.func.grad(
        lambda p: torch.func.functional_call(model, p, torch.ones(2, 4)).square().sum()
    )({name: p.detach() for name, p in params.items()})
    for name, p in params.items():
        p.grad = grads[name]
    optimizer.step()
    assert losses[0] > losses[1] > losses[2]
    assert_same_models(model, make_model())


@pytest.mark.parametrize(
    "wrap",
    [
        torch.nn.utils.parametrizations.weight_norm,
        torch.nn.utils.parametrizations.spectral_norm,
        torch.nn.utils.parametrizations.orthogonal,
    ],
)
def test_parametrized_weights(wrap):
    torch.manual_seed(0)
    model = wrap(torch.nn.Linear(4, 4))
    twin = copy.deepcopy(model)
    fused, reference = (
        fusedopt.FusedAdamW(network.named_parameters(), max_grad_norm=0.1, backend=name)
        for network, name in ((model, None), (twin, "reference"))
    )
    for seed in range(3):
        for network, optimizer in ((model, fused), (twin, reference)):
            optimizer.zero_grad()
            backward(network, seed)
            optimizer.step()
    assert_same_bits(tensors_of(fused), tensors_of(reference))


def test_moving_average_of_a_model():
    model, twin = make_model(), make_model()
    optimizer = fusedopt.FusedAdam(model.parameters(), lr=0.1)
    decay = torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=decay)
    average.update_parameters(model)
    for seed in range(3):
        backward(model, seed)
        optimizer.step()
        average.update_parameters(model)
    for mean, start, end in zip(
        average.module.parameters(), twin.parameters(), model.parameters(), strict=True
    ):
        assert not mean.equal(start) and not mean.equal(end)


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("as_view", [True, False])
@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_distributed_data_parallel(process_group, case, as_view):
    """With views, gradients are slices of a bucket that is reduced in place."""
    model, twin = (
        DistributedDataParallel(make_model(), gradient_as_bucket_view=as_view),
        make_model(),
    )
    both = [(net, case.cls(net.parameters(), max_grad_norm=0.1)) for net in (model, twin)]
    for seed in range(4):
        for network, optimizer in both:
            optimizer.zero_grad(set_to_none=seed % 2 == 0)
            backward(network, seed)
            optimizer.step()
    assert_same_models(model, twin)
    assert both[0][1].grad_norm == both[1][1].grad_norm > 0


# It imports what torch.distributed still scripts.
@pytest.mark.filterwarnings("ignore:`torch.jit.:DeprecationWarning")
@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_zero_redundancy_optimizer(process_group, case):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model, twin = make_model(), make_model()
    sharded = ZeroRedundancyOptimizer(model.parameters(), case.cls, lr=0.1, max_grad_norm=0.1)
    plain = case.cls(twin.parameters(), lr=0.1, max_grad_norm=0.1)
    for seed in range(3):
        for network, optimizer in ((model, sharded), (twin, plain)):
            optimizer.zero_grad()
            backward(network, seed)
            optimizer.step()
        sharded.consolidate_state_dict()
        sharded.load_state_dict(sharded.state_dict())
    assert_same_models(model, twin)


@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_distributed_checkpoint(process_group, case):
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model, other = make_model(), make_model()
    optimizer = case.cls(model.parameters(), lr=0.1)
    for seed in range(2):
        backward(model, seed)
        optimizer.step()
    again = case.cls(other.parameters(), lr=0.2)
    saved = get_state_dict(model, optimizer)
    states = copy.deepcopy(saved[1])  # as torch's own, an optimizer takes over the tensors
    set_state_dict(other, again, model_state_dict=saved[0], optim_state_dict=states)
    assert again.param_groups[0]["lr"] == 0.1
    for network, o in ((model, optimizer), (other, again)):
        o.zero_grad()
        backward(network, 2)
        o.step()
    assert_same_bits(tensors_of(again), tensors_of(optimizer))


def test_sharded_parameters_step_as_plain_ones(process_group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    models = [make_model(), make_model()]
    models[1].load_state_dict(models[0].state_dict())
    fully_shard(models[1], mesh=init_device_mesh("cpu", (1,)))
    for model in models:
        optimizer = fusedopt.FusedAdam(model.named_parameters(), max_grad_norm=1.0)
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()
    for plain, sharded in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(plain, sharded.full_tensor())


@pytest.fixture
def two_ranks(process_group, monkeypatch):
    """As far as an optimizer looks: what one rank of two would see."""
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 2)


def assert_refused_where_a_norm_is_asked_for(make, words):
    """Only the update is right on each rank by itself."""
    for options in ({"max_grad_norm": 1.0}, {"nonfinite": "skip"}, {"nonfinite": "raise"}):
        (name,) = options
        with pytest.raises(RuntimeError, match=rf"{name}=.* can't be had: {words}.*half-updated"):
            make(**options)
    optimizer = make()
    for options in ({"max_grad_norm": 1.0}, {"nonfinite": "skip"}, {"nonfinite": "raise"}):
        ((name, value),) = options.items()
        with pytest.raises(RuntimeError, match=rf"{name}=.* can't be had: {words}"):
            setattr(optimizer, name, value)
        assert getattr(optimizer, name) is None
    optimizer.nonfinite, optimizer.max_grad_norm = "propagate", None
    params = [p for group in optimizer.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in params]
    for param in params:
        param.grad = torch.ones_like(param)
    scaler = fusedopt.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    with pytest.raises(RuntimeError, match=rf"fusedopt.GradScaler can't be had: {words}"):
        scaler.step(optimizer)
    assert all(map(torch.equal, params, before))
    optimizer.step()
    assert not any(map(torch.equal, params, before))


@pytest.mark.parametrize("mark", ["_is_flat_param", "_fsdp_flattened"])
def test_parts_of_flat_parameters_are_refused_where_a_norm_is_asked_for(two_ranks, mark):
    model = make_model()
    setattr(model[0].bias, mark, True)
    words = r"'0.bias' \(parameter 1 of param group 0\) is a part of FullyShardedDataParallel's"
    words += r".* process_group=, and give plain='own'"
    assert_refused_where_a_norm_is_asked_for(
        lambda **options: fusedopt.FusedAdam(model.named_parameters(), **options), words
    )


def test_flat_parameters_have_the_marks_that_are_looked_for(process_group):
    from torch.distributed.fsdp import FullyShardedDataParallel

    for use_orig_params in (False, True):
        with pytest.warns():
            model = FullyShardedDataParallel(
                make_model(), use_orig_params=use_orig_params, device_id=torch.device("cpu")
            )
        for param in model.parameters():
            assert getattr(param, "_is_flat_param", False) or param._fsdp_flattened
        # On one rank each has all there is.
        fusedopt.FusedAdam(model.parameters(), max_grad_norm=1.0)


@pytest.mark.filterwarnings("ignore:`torch.jit.:DeprecationWarning")
def test_zero_redundancy_optimizer_is_refused_where_a_norm_is_asked_for(two_ranks, monkeypatch):
    from torch.distributed.optim import ZeroRedundancyOptimizer, zero_redundancy_optimizer

    params = list(make_model().parameters())

    def make(**options):
        with monkeypatch.context() as patch:
            patch.setattr(torch.distributed, "get_world_size", lambda *_: 1)
            patch.setattr("fusedopt.core.sharding._several_ranks", lambda: True)
            return ZeroRedundancyOptimizer(params, fusedopt.FusedAdam, **options).optim

    assert zero_redundancy_optimizer.__name__ == ZeroRedundancyOptimizer.__module__
    assert_refused_where_a_norm_is_asked_for(
        make,
        "ZeroRedundancyOptimizer gives each rank its own parameters. Clip all of the model's "
        "gradients with fusedopt.clip_grad_norm_ before the step. As it is",
    )


def test_group_that_was_refused_leaves_no_trace(two_ranks):
    model = make_model()
    optimizer = fusedopt.FusedAdam(model[0].parameters(), max_grad_norm=1.0)
    model[2].bias._is_flat_param = True
    with pytest.raises(RuntimeError, match="can't be had"):
        optimizer.add_param_group({"params": model[2].parameters()})
    optimizer.max_grad_norm = 2.0
    assert len(optimizer.param_groups) == 1
