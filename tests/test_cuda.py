"""Tests that need a GPU: graphs, streams, several devices, waiting, and very many elements."""

from __future__ import annotations

import gc
import os

import pytest
import torch
from cases import CLASSES, assert_same_bits, make_params, same_bits, set_grads, tensors_of
from test_build import ROOT, python
from torch.nn import Parameter
from waiting import waiting_is_an_error

import fusedopt
from fusedopt.core import backends

reason = backends.why_missing("cuda")
pytestmark = pytest.mark.skipif(reason is not None, reason=f"no CUDA here: {reason}")

SHAPES = [(33,), (16385,), (64, 33), (), (40000,)]
MANY = [(17,)] * 600  # more than a kernel's smaller arguments hold


def needs_memory(gibibytes: float) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < gibibytes * 2**30:
        pytest.skip(f"needs {gibibytes} GiB of GPU memory, and {free / 2**30:.0f} are free")


def on_gpu(case, shapes=SHAPES, device="cuda", **kwargs):
    params = make_params(shapes, device=device)
    return case.cls(params, **case.kwargs, **kwargs), params


# ----------------------------------------------------------------------------------------- Waiting


@pytest.mark.parametrize("kwargs", [{}, {"max_grad_norm": 1.0}, {"nonfinite": "skip"}], ids=str)
@pytest.mark.parametrize("shapes", [SHAPES, MANY], ids=["few", "many"])
@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_no_step_waits_for_the_device(case, shapes, kwargs):
    optimizer, params = on_gpu(case, shapes, **kwargs)
    set_grads(params, seed=0)
    others = [torch.randn_like(p) for p in params]
    with waiting_is_an_error():
        for number in range(4):
            if number == 2:  # new gradients, one of them missing
                for param, grad in zip(params, others, strict=True):
                    param.grad = grad
                params[0].grad = None
            optimizer.step()
    assert optimizer.grad_norm > 0


def test_no_scaled_step_waits_for_the_device():
    optimizer, params = on_gpu(CLASSES[0], max_grad_norm=1.0)
    set_grads(params, seed=0)
    scaler = fusedopt.GradScaler(init_scale=2.0, growth_interval=2)
    scaler.scale(torch.zeros((), device="cuda"))
    with waiting_is_an_error():
        for _ in range(4):
            scaler.step(optimizer)
            scaler.update()
    assert scaler.get_scale() == 8


# ------------------------------------------------------------------------------------------ Graphs


class Training:
    """Whole steps of a small network: forward, backward, and the optimizer with a scaler."""

    def __init__(self, cls, inputs, lr):
        torch.manual_seed(0)
        layers = [torch.nn.Linear(20, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1)]
        self.model = torch.nn.Sequential(*layers).cuda()
        self.optimizer = cls(self.model.parameters(), lr=lr, max_grad_norm=0.1)
        self.scaler = fusedopt.GradScaler(init_scale=2.0**10, growth_interval=3)
        self.inputs = inputs.clone()

    def step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.model(self.inputs).square().mean()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def captured(self) -> torch.cuda.CUDAGraph:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.cuda.graph(graph):
            self.step()
        return graph


@pytest.mark.parametrize("cls", [case.cls for case in CLASSES], ids=lambda cls: cls.__name__)
def test_a_training_step_replays_with_the_bits_of_eager_ones(cls):
    batches = torch.randn(6, 32, 20, device="cuda")
    batches[3, 0, 0] = torch.inf  # this step is skipped
    rates = [0.1, 0.1, 0.01, 0.02, 0.05, 0.1]
    eager_lr, graph_lr = (torch.tensor(0.1, device="cuda") for _ in range(2))
    eager, graphed = Training(cls, batches[0], eager_lr), Training(cls, batches[0], graph_lr)
    graph = graphed.captured()
    for _ in range(3):
        eager.step()
    for batch, rate in zip(batches, rates, strict=True):
        eager_lr.fill_(rate)
        graph_lr.fill_(rate)
        eager.inputs.copy_(batch)
        graphed.inputs.copy_(batch)
        eager.step()
        graph.replay()
        assert_same_bits(tensors_of(graphed.optimizer), tensors_of(eager.optimizer))
        assert graphed.optimizer.step_skipped == eager.optimizer.step_skipped
        assert same_bits(graphed.optimizer.grad_norm, eager.optimizer.grad_norm)
    assert graphed.optimizer.skipped_steps == 1
    assert graphed.scaler.get_scale() == eager.scaler.get_scale()


@pytest.mark.parametrize("shapes", [SHAPES, MANY], ids=["few", "many"])
def test_a_graph_outlives_the_plan_that_it_was_captured_with(shapes):
    optimizer, params = on_gpu(CLASSES[0], shapes, max_grad_norm=1.0)
    twin, twins = on_gpu(CLASSES[0], shapes, max_grad_norm=1.0)
    set_grads(params, seed=0)
    set_grads(twins, seed=0)
    optimizer.step()
    twin.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    extra = make_params([(5,)], device="cuda")
    optimizer.add_param_group({"params": extra})
    set_grads(extra, seed=1)
    optimizer.max_grad_norm = None
    optimizer.step()  # makes another plan; the graph's tables are to stay
    optimizer.max_grad_norm = twin.max_grad_norm = None
    twin.step()
    junk = [torch.full((2**k,), 255, dtype=torch.uint8, device="cuda") for k in range(4, 22)]
    graph.replay()
    twin.max_grad_norm = 1.0
    twin.step()
    for param, expected in zip(params, twins, strict=True):
        assert same_bits(param, expected)
    del junk


def first_clipped_step_is_captured() -> None:
    optimizer, params = on_gpu(CLASSES[0])
    twin, twins = on_gpu(CLASSES[0])
    for tensors, its in ((params, optimizer), (twins, twin)):
        set_grads(tensors, seed=0)
        its.step()
        its.max_grad_norm = 1.0
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for seed in range(1, 4):
        set_grads(twins, seed)
        for param, other in zip(params, twins, strict=True):
            param.grad.copy_(other.grad)  # where the graph reads it
        graph.replay()
        twin.step()
        assert_same_bits(tensors_of(optimizer), tensors_of(twin))
        assert same_bits(optimizer.grad_norm, twin.grad_norm)
        assert optimizer.grad_norm > 1 and optimizer.skipped_steps == 0


def test_the_first_clipped_step_may_be_a_captured_one():
    """A limit that is a float has no state. In a process that has run no kernel for it yet."""
    code = "import test_cuda; test_cuda.first_clipped_step_is_captured()"
    paths = os.pathsep.join([str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = python("-c", code, PYTHONPATH=paths)
    assert done.returncode == 0, done.stderr


# ----------------------------------------------------------------------------------------- Streams


def test_the_step_runs_on_the_current_stream():
    optimizer, params = on_gpu(CLASSES[0], max_grad_norm=1.0)
    expected, twins = on_gpu(CLASSES[0], max_grad_norm=1.0)
    stream = torch.cuda.Stream()
    for seed in range(3):
        set_grads(twins, seed)
        expected.step()
        grads = [p.grad.clone() for p in twins]
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # what follows on this stream comes late
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad * 1
            optimizer.step()
        torch.cuda.synchronize()
    assert_same_bits(tensors_of(optimizer), tensors_of(expected))


def test_memory_of_a_step_on_another_stream_is_not_reused_too_early():
    """The plan's tables come from one stream, are read on another, and are dropped meanwhile."""
    expected, twins = on_gpu(CLASSES[0], MANY, max_grad_norm=1.0)
    optimizer, params = on_gpu(CLASSES[0], MANY, max_grad_norm=1.0)
    for tensors, its in ((params, optimizer), (twins, expected)):
        set_grads(tensors, seed=0)
        its.step()
    expected.step()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        optimizer.step()
    optimizer._plan = optimizer._own["control"] = None
    gc.collect()
    junk = [torch.full((1 << 16,), 255, dtype=torch.uint8, device="cuda") for _ in range(200)]
    torch.cuda.synchronize()
    for param, twin in zip(params, twins, strict=True):
        assert same_bits(param, twin)
    del junk


# ----------------------------------------------------------------------------------------- Devices


@pytest.mark.parametrize("kwargs", [{}, {"max_grad_norm": 0.5}], ids=str)
def test_two_devices_are_one_step(kwargs):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    devices = ["cuda:0", "cuda:1"]
    params = [p for d in devices for p in make_params(SHAPES, device=d)]
    twins = [Parameter(p.detach().cpu()) for p in params]
    optimizer = fusedopt.FusedAdam(params, **kwargs)
    expected = fusedopt.FusedAdam(twins, backend="reference", **kwargs)
    for seed in range(3):
        set_grads(params, seed)
        set_grads(twins, seed)
        optimizer.step()
        expected.step()
    assert torch.cuda.current_device() == 0
    torch.testing.assert_close([p.detach().cpu() for p in params], [t.detach() for t in twins])


def test_a_device_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    optimizer, params = on_gpu(CLASSES[0], device="cuda:1", max_grad_norm=1.0)
    expected, twins = on_gpu(CLASSES[0], device="cuda:0", max_grad_norm=1.0)
    for tensors, its in ((params, optimizer), (twins, expected)):
        set_grads(tensors, seed=0)
        its.step()
    assert torch.cuda.current_device() == 0
    assert_same_bits(tensors_of(optimizer), tensors_of(expected))


# ------------------------------------------------------------------------------------------- Sizes


def test_more_than_2_to_the_31_elements_in_a_tensor():
    count = 2**31 + 16385
    needs_memory(5 * count * 2 / 2**30)
    param = Parameter(torch.ones(count, dtype=torch.bfloat16, device="cuda"))
    param.grad = torch.ones_like(param)
    small = Parameter(torch.ones(1, dtype=torch.bfloat16))
    small.grad = torch.ones_like(small)
    expected = fusedopt.FusedAdam([small], lr=0.1, backend="reference")
    optimizer = fusedopt.FusedAdam([param], lr=0.1, nonfinite="skip")
    for _ in range(2):
        optimizer.step()
        expected.step()
    assert (param == small.item()).all()
    assert abs(optimizer.grad_norm.item() / count**0.5 - 1) < 1e-6
    param.grad[-1] = torch.nan
    optimizer.step()
    assert optimizer.step_skipped and param[-1] == small.item()


def test_more_than_2_to_the_31_elements_in_total():
    count, tensors = 2**29 + 3, 5
    needs_memory(2 * 5 * tensors * count / 2**30)
    params = [Parameter(torch.ones(count, dtype=torch.bfloat16, device="cuda")) for _ in range(5)]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = fusedopt.FusedAdam(params, lr=0.1, max_grad_norm=1e9)
    optimizer.step()
    first = params[0][0].item()
    assert first != 1 and all(bool((p == first).all()) for p in params)
    assert abs(optimizer.grad_norm.item() / (tensors * count) ** 0.5 - 1) < 1e-6


def test_a_hundred_thousand_tensors():
    flat = torch.ones(100_000, 8, device="cuda")
    params = [Parameter(row) for row in flat]
    for param, grad in zip(params, torch.ones_like(flat), strict=True):
        param.grad = grad
    optimizer = fusedopt.FusedAdam(params, lr=0.1, max_grad_norm=1e9)
    for _ in range(2):
        optimizer.step()
    assert flat.unique().numel() == 1 and flat[0, 0] < 1
    assert abs(optimizer.grad_norm.item() - 800_000**0.5) < 1e-2
