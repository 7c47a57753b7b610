"""Steps without compiled kernels: torch's own functions keep the promises of the classes."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from cases import CASES, CLASSES, assert_same_bits, make_params, set_grads, snapshot, tensors_of
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

import fusedopt
from fusedopt.core import backends, fallback

SHAPES = [(0,), (), (55,), (2, 3, 41), (2222,)]


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch):
    """What large parameters are cut into is small here, so that SHAPES has large ones."""
    monkeypatch.setattr(backends, "_C", None)
    monkeypatch.setattr(backends, "found", backends.found._replace(reason="of a test"))
    monkeypatch.setattr(backends, "_warned", set())
    monkeypatch.setattr(fallback, "BLOCK", 1_000)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fusedopt runs on torch's own functions")
        yield


def run(cls, steps=4, dtype=torch.float32, shapes=SHAPES, scale=1.0, **kwargs):
    params = make_params(shapes, dtype)
    optimizer = cls(params, **kwargs)
    for step in range(steps):
        set_grads(params, step, scale)
        optimizer.step()
    return optimizer


def assert_close(actual, expected, rtol, atol):
    actual, expected = tensors_of(actual), tensors_of(expected)
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        torch.testing.assert_close(
            value,
            expected[name].to(value.dtype),
            rtol=rtol,
            atol=atol,
            msg=f"{name} differs",
        )


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_it_is_torch_step(case, dtype):
    twin = {**case.kwargs, "foreach": False}
    rtol, atol = (1e-4, 1e-5) if dtype == torch.float32 else (1e-9, 1e-12)
    ours = run(case.cls, dtype=dtype, **case.kwargs)
    assert isinstance(ours._plan, fallback.TorchPlan)
    assert_close(ours, run(case.twin, dtype=dtype, **twin), rtol, atol)


@pytest.mark.parametrize("case", CLASSES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bits_are_computed_in_float32(case, dtype):
    options = {"eps": 1e-3} if "eps" in case.twin([torch.zeros(1)]).defaults else {}
    options.update(case.kwargs, max_grad_norm=30.0)
    ours = run(case.cls, dtype=dtype, **options)
    exact = run(case.cls, dtype=dtype, backend="reference", **options)
    assert_close(ours, exact, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps / 4)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_clipped_it_is_the_reference_but_for_rounding(case):
    options = {"max_grad_norm": 0.5, **case.kwargs}
    ours, exact = run(case.cls, **options), run(case.cls, backend="reference", **options)
    assert_close(ours, exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.grad_norm, exact.grad_norm)
    assert ours.explain().startswith("step 4: gradient norm ")


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_a_skip_keeps_every_bit(case, bad):
    optimizer = run(case.cls, max_grad_norm=1.0, **case.kwargs)
    params = optimizer.param_groups[0]["params"]
    before = snapshot(optimizer)
    params[-1].grad[1_500] = bad
    grads = [param.grad.clone() for param in params]
    optimizer.step()
    assert_same_bits(snapshot(optimizer), before)
    assert_same_bits(dict(enumerate(p.grad for p in params)), dict(enumerate(grads)))
    assert optimizer.step_skipped and optimizer.skipped_steps == 1
    set_grads(params, 5)
    optimizer.step()
    assert not optimizer.step_skipped and optimizer.skipped_steps == 1


def test_a_first_step_that_is_skipped_leaves_no_state():
    optimizer = run(fusedopt.FusedSGD, 1, scale=math.inf, momentum=0.9, max_grad_norm=1.0)
    assert optimizer.step_skipped and not optimizer.state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gradient_of_1e30_is_clipped_and_not_taken_for_an_overflow(dtype):
    optimizer = run(fusedopt.FusedSGD, 1, dtype, scale=1e30, lr=1.0, max_grad_norm=1.0)
    unmoved = make_params(SHAPES, dtype)
    params = optimizer.param_groups[0]["params"]
    moved = [(a.double() - b.double()).square().sum() for a, b in zip(params, unmoved)]
    tolerance = 1e-5 if dtype == torch.float32 else 0.2  # what is left of it beside a parameter
    assert not optimizer.step_skipped
    assert sum(moved).sqrt().item() == pytest.approx(1.0, rel=tolerance)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e12, 1e30])
def test_the_norm_is_read_right_where_nothing_depends_on_it(scale):
    """Without a limit it may be summed in float32, but not where its squares don't fit there."""
    optimizer = run(fusedopt.FusedSGD, 1, scale=scale)
    grads = [param.grad for group in optimizer.param_groups for param in group["params"]]
    expected = torch.cat([grad.double().flatten() for grad in grads]).norm()
    torch.testing.assert_close(optimizer.grad_norm, expected.float(), rtol=1e-5, atol=0)
    assert not optimizer.step_skipped


def test_gradients_are_not_written():
    optimizer = run(fusedopt.FusedAdamW, 1, max_grad_norm=1e-3)
    expected = make_params(SHAPES)
    set_grads(expected, 0)
    params = optimizer.param_groups[0]["params"]
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(params, expected))


def test_raise_names_the_parameters_and_propagate_updates():
    params = make_params([(3,), (4,)])
    set_grads(params, 0)
    params[1].grad[2] = math.nan
    optimizer = fusedopt.FusedAdam([("a", params[0]), ("b", params[1])], nonfinite="raise")
    with pytest.raises(fusedopt.NonFiniteGradientError, match="'b'") as raised:
        optimizer.step()
    assert len(raised.value.names) == 1 and not optimizer.state
    optimizer.nonfinite = "propagate"
    optimizer.step()
    assert params[1].isnan().tolist() == [False, False, True, False]
    assert optimizer.grad_norm.isnan() and not optimizer.step_skipped


@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_a_scaler_unscales_and_skips(case):
    optimizer = run(case.cls, 0, max_grad_norm=1.0, **case.kwargs)
    expected = run(case.cls, 1, max_grad_norm=1.0, **case.kwargs)
    params = optimizer.param_groups[0]["params"]
    set_grads(params, 0, scale=1024.0)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
    optimizer.step()
    assert_close(optimizer, expected, rtol=1e-6, atol=1e-7)
    before = snapshot(optimizer)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert_same_bits(snapshot(optimizer), before)


def test_groups_have_their_own_options():
    params = make_params([(7,), (9,)])
    set_grads(params, 0)
    twins = make_params([(7,), (9,)])
    set_grads(twins, 0)
    for cls, (a, b) in ((fusedopt.FusedAdamW, params), (torch.optim.AdamW, twins)):
        groups = [{"params": [a], "lr": 0.1}, {"params": [b], "betas": (0.5, 0.6), "amsgrad": True}]
        cls(groups, lr=0.01).step()
    for param, twin in zip(params, twins):
        torch.testing.assert_close(param, twin)


def mixed_params():
    """Layouts and dtypes for which torch's fused functions are wrong or refuse."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=generator).to(dtype)

    params = [
        draw(4, 6),  # its gradient is transposed
        draw(2, 3, 5, 7).to(memory_format=torch.channels_last),  # its gradient isn't
        draw(8, 10)[:, 3:7],  # with gaps
        draw(11, dtype=torch.bfloat16),  # its gradient is float32
        draw(5),  # its gradient is expanded
        draw(50, 30).t(),  # it and its gradient lie alike, and are large
    ]
    params = [param.requires_grad_() for param in params]
    params[0].grad = draw(6, 4).t()
    params[1].grad = draw(2, 3, 5, 7)
    params[2].grad = draw(8, 4)
    params[3].grad_dtype = None
    params[3].grad = draw(11)
    params[4].grad = draw(1).expand(5)
    params[5].grad = draw(50, 30).t()
    return params


@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_any_layout_and_dtype(case):
    ours = case.cls(mixed_params(), max_grad_norm=1.0, **case.kwargs)
    exact = case.cls(mixed_params(), max_grad_norm=1.0, backend="reference", **case.kwargs)
    for _ in range(3):
        ours.step()
        exact.step()
    assert_close(ours, exact, rtol=1e-5, atol=1e-6)


def test_a_float32_state_beside_16_bits_stays_one():
    optimizer = run(fusedopt.FusedAdam, 1, torch.bfloat16)
    state_dict = optimizer.state_dict()
    for state in state_dict["state"].values():
        state["exp_avg"], state["exp_avg_sq"] = (
            state["exp_avg"].float(),
            state["exp_avg_sq"].float(),
        )
    optimizer.load_state_dict(state_dict)
    optimizer.step()
    assert all(state["exp_avg"].dtype == torch.float32 for state in optimizer.state.values())


def test_a_first_gradient_is_not_dampened_whenever_it_comes():
    options = {"momentum": 0.9, "dampening": 0.5, "lr": 0.1}
    results = []
    for cls in (fusedopt.FusedSGD, torch.optim.SGD):
        params = make_params([(3,), (2_500,)])
        optimizer = cls(params, **options)
        for step in range(3):
            set_grads(params, step)
            if step == 0:
                params[1].grad = None
            optimizer.step()
        results.append(optimizer)
    assert_close(*results, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_a_checkpoint_goes_to_torch_and_back(case):
    ours = run(case.cls, 2, **case.kwargs)
    twin = case.twin(make_params(SHAPES), **case.kwargs)
    expected = run(case.cls, 4, **case.kwargs)
    for source, target, step in ((ours, twin, 2), (twin, ours, 3)):
        target.load_state_dict(source.state_dict())
        params = target.param_groups[0]["params"]
        with torch.no_grad():
            for param, known in zip(params, source.param_groups[0]["params"]):
                param.copy_(known)
        set_grads(params, step)
        target.step()
    assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_what_changes_between_steps_is_noticed():
    param = Parameter(torch.ones(3))
    optimizer = fusedopt.FusedSGD([param], lr=1.0)
    param.grad = torch.ones(3)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.step()
    assert param.tolist() == [-0.5] * 3
    optimizer.param_groups[0]["momentum"] = 0.5
    optimizer.step()
    optimizer.step()
    assert param.tolist() == [-0.5 - 0.5 - 0.75] * 3
    optimizer.state.clear()
    param.data = torch.zeros(3, dtype=torch.float64)
    param.grad = torch.ones(3, dtype=torch.float64)
    optimizer.step()
    assert param.tolist() == [-0.5] * 3 and param.dtype == torch.float64
    param.grad = None
    optimizer.step()
    assert param.tolist() == [-0.5] * 3 and optimizer.grad_norm == 0
    param.grad = torch.ones(3, dtype=torch.float64)
    optimizer.step()
    param.grad.untyped_storage().resize_(8)
    with pytest.raises(RuntimeError, match="the gradient of parameter 0 of param group 0"):
        optimizer.step()
    param.grad = torch.ones(3, dtype=torch.float64).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()


LIMITS = {"max_grad_norm": fusedopt.clip.PerTensor(warmup=1)}, {"telemetry": 5}


@pytest.mark.parametrize("kwargs", LIMITS, ids=str)
def test_what_torch_has_not_runs_on_the_reference_and_says_so(kwargs):
    with pytest.warns(RuntimeWarning, match=f"on its reference, .* can't do {next(iter(kwargs))}"):
        ours = run(fusedopt.FusedAdamW, **kwargs)
    exact = run(fusedopt.FusedAdamW, backend="reference", **kwargs)
    assert_same_bits(snapshot(ours), snapshot(exact))


def test_a_limit_may_come_and_go():
    optimizer = run(fusedopt.FusedAdamW, 2, max_grad_norm=1.0)
    optimizer.max_grad_norm = fusedopt.clip.Percentile()
    with pytest.warns(RuntimeWarning, match="can't do max_grad_norm=Percentile"):
        optimizer.step()
    optimizer.max_grad_norm = 1.0
    optimizer.step()
    assert isinstance(optimizer._plan, fallback.TorchPlan)
    assert optimizer.state[optimizer.param_groups[0]["params"][0]]["step"] == 4


def test_it_warns_once_and_says_why():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            run(fusedopt.FusedAdam)
            run(fusedopt.FusedSGD)
    messages = [str(warning.message) for warning in caught]
    assert messages == [
        "fusedopt runs on torch's own functions, without its compiled kernels: of a test"
    ]


class Counting(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("cls", [fusedopt.FusedAdamW, fusedopt.FusedRMSprop])
def test_calls_of_torch_do_not_grow_with_the_number_of_tensors(cls, monkeypatch):
    monkeypatch.setattr(fallback, "BLOCK", 1 << 18)
    counts = []
    for number in (50, 100):
        optimizer = run(cls, 2, shapes=[(64,)] * number, max_grad_norm=1.0)
        with Counting() as counting:
            optimizer.step()
        counts.append(counting.count)
    assert counts[0] == counts[1] <= 40


@pytest.mark.parametrize("norm_type", [2.0, math.inf, 1.0])
@pytest.mark.parametrize("scale", [1.0, 1e30])
def test_clipping_alone(norm_type, scale):
    params, twins = make_params(SHAPES), make_params(SHAPES)
    set_grads(params, 0, scale)
    for param, twin in zip(params, twins):
        twin.grad_dtype = None
        twin.grad = param.grad.double()
    norm = fusedopt.clip_grad_norm_(params, 1.0, norm_type)
    assert norm.dtype == torch.float32
    grads = [grad.double() for grad in (t.grad for t in twins) if grad.numel() > 0]
    expected = torch.nn.utils.get_total_norm(grads, norm_type)
    assert norm.item() == pytest.approx(expected.item(), rel=1e-6)
    for param, twin in zip(params, twins):
        torch.testing.assert_close(param.grad.double(), twin.grad / expected, rtol=1e-5, atol=1e-12)
