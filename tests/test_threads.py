"""Steps in several threads of one process, and in forked processes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from cases import CLASSES, assert_same_bits, make_params, set_grads, tensors_of

import fusedopt

# A step over this many elements lets other Python threads run meanwhile.
LARGE = (1 << 20) + 5


def in_threads(*functions):
    errors = []

    def guarded(function):
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(f,), daemon=True) for f in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("shapes", [[(300,)] * 20, [(LARGE,), (7,)]], ids=["small", "large"])
def test_threads_that_each_step_an_optimizer(backend, shapes):
    if backend.name == "emulated":
        shapes = [(300,)] * 3  # one fiber per thread of the device: slow

    def trained(case, seed):
        params = make_params(shapes, device=backend.device, seed=seed)
        optimizer = backend.make(case.cls, params, max_grad_norm=1.0)
        set_grads(params, seed)
        return optimizer

    def run(optimizer):
        for _ in range(5):
            optimizer.step()

    cases = (CLASSES * 4)[:4]
    together = [trained(case, seed) for seed, case in enumerate(cases)]
    alone = [trained(case, seed) for seed, case in enumerate(cases)]
    in_threads(*[lambda optimizer=optimizer: run(optimizer) for optimizer in together])
    for optimizer in alone:
        run(optimizer)
    for actual, expected in zip(together, alone):
        assert_same_bits(tensors_of(actual), tensors_of(expected))
        assert actual.grad_norm == expected.grad_norm


def test_readings_and_zero_grad_from_another_thread_during_a_step(backend):
    """A reading belongs to one step, which may have seen all gradients, some or none."""
    shape = (300,) if backend.name == "emulated" else (LARGE,)
    params = make_params([shape, (7,)], device=backend.device)
    optimizer = backend.make(fusedopt.FusedAdam, params, max_grad_norm=1.0)
    set_grads(params, 0)
    # Held here, so that dropping one frees nothing: torch lets other threads run while it frees a
    # gradient that `.grad` still points to, and two threads that write `.grad` corrupt the heap.
    grads = [param.grad for param in params]
    possible = []
    for dropped in ([], params[:1], params[1:], params):
        for param, grad in zip(params, grads):
            param.grad = None if any(param is other for other in dropped) else grad
        optimizer.step()
        possible.append(optimizer.grad_norm.item())
    done = threading.Event()

    def step():
        for _ in range(20):
            for param, grad in zip(params, grads):
                param.grad = grad
            optimizer.step()
        done.set()

    def watch():
        while not done.is_set():
            assert optimizer.grad_norm.item() in possible
            assert not optimizer.step_skipped and optimizer.skipped_steps == 0
            optimizer.zero_grad()
            optimizer.state_dict()

    in_threads(step, watch)
    assert all(p.isfinite().all() for p in params)


def test_gradient_dropped_during_a_step_stays_until_its_end():
    """Without this, its memory would go back to the system, and reading it would crash."""

    def trained():
        params = make_params([(4 * LARGE,)])
        optimizer = fusedopt.FusedAdam(params, max_grad_norm=1.0, backend="cpu")
        set_grads(params, 0)
        optimizer.step()
        return optimizer, params[0]

    (optimizer, param), (undisturbed, _) = trained(), trained()
    grad = param.grad.clone()
    in_kernels, ended, dropped_meanwhile = (threading.Event() for _ in range(3))
    # Before the first hook and after the second, torch itself lets other threads run.
    optimizer.register_step_pre_hook(lambda *_: in_kernels.set())
    optimizer.register_step_post_hook(lambda *_: in_kernels.clear())

    def step():
        optimizer.step()
        ended.set()

    def drop():
        while not in_kernels.is_set():
            if ended.is_set():  # a busy machine didn't let this thread run meanwhile
                return
            time.sleep(0)
        param.grad = None
        if in_kernels.is_set():
            dropped_meanwhile.set()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(30)  # no thread gives way but where it waits or says so: in the kernels
    try:
        give_up = time.monotonic() + 120
        while not dropped_meanwhile.is_set() and time.monotonic() < give_up:
            param.grad = grad.clone()
            ended.clear()
            in_threads(step, drop)
            undisturbed.step()
    finally:
        sys.setswitchinterval(interval)
    assert dropped_meanwhile.is_set()
    assert_same_bits(tensors_of(optimizer), tensors_of(undisturbed))


def test_threads_that_step_one_optimizer():
    """They take turns, even if a parameter gets new memory meanwhile."""

    def trained(run):
        params = make_params([(LARGE,), (64, 64)])
        optimizer = fusedopt.FusedAdam(params, max_grad_norm=1.0)
        set_grads(params, 0)
        run(optimizer, params)
        return optimizer

    def step(optimizer, params):
        for _ in range(10):
            optimizer.step()
            params[1].data = params[1].data.clone()

    # Who clones a parameter during another's step may miss a part of it: the first one is not.
    together = trained(lambda o, ps: in_threads(*[lambda: step(o, ps)] * 3))
    alone = trained(lambda o, ps: [step(o, ps) for _ in range(3)])
    actual, expected = (
        {name: value for name, value in tensors_of(o).items() if name.endswith(" 0")}
        for o in (together, alone)
    )
    assert_same_bits(actual, expected)


FORK = """
import os, signal, torch, fusedopt
torch.set_num_threads(2)
param = torch.nn.Parameter(torch.linspace(-1, 1, 200_000))
param.grad = torch.linspace(2, -3, 200_000)
optimizer = fusedopt.FusedAdam([param], max_grad_norm=1.0, backend="cpu")
optimizer.step()
if (child := os.fork()) == 0:
    signal.alarm(30)
    optimizer.step()
    with open("child", "wb") as file:
        file.write(param.detach().numpy().tobytes())
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0, "the child was stopped while it waited"
optimizer.step()
assert open("child", "rb").read() == param.detach().numpy().tobytes()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing to fork with")
def test_forked_child_steps_as_its_parent_does(tmp_path):
    """The child lacks its parent's threads, which OpenMP expects."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", FORK], cwd=tmp_path, env=environment, check=True)


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.full((200_000,), float(index))


def test_loader_with_workers_between_steps():
    param = torch.nn.Parameter(torch.ones(200_000))
    optimizer = fusedopt.FusedAdam([param], max_grad_norm=1.0)
    for epoch in range(2):
        loader = torch.utils.data.DataLoader(
            Numbers(), batch_size=4, num_workers=1, multiprocessing_context="fork"
        )
        for batch in loader:
            optimizer.zero_grad()
            (batch * param).sum().backward()
            optimizer.step()
        assert optimizer.state[param]["step"] == 2 * (epoch + 1)
