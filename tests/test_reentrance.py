"""A step is safe from Python code and other threads that run in the middle of it."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from cases import assert_same_bits, make_params, set_grads, snapshot, tensors_of
from torch.utils._python_dispatch import TorchDispatchMode

import fusedopt


# --- Python code that runs while a step looks at everything
class Shrinks:
    def __init__(self, target):
        self.target = target

    def __float__(self):
        self.target.clear()
        return 0.5


def test_lists_that_shrink_while_they_are_read(backend):
    (param,) = make_params([(20,)], device=backend.device)
    optimizer = backend.make(fusedopt.FusedAdam, [param])
    param.grad = torch.ones_like(param)
    optimizer.step()
    before = snapshot(optimizer)
    betas: list = [0.5, 0.5]
    betas[0] = Shrinks(betas)
    optimizer.param_groups[0]["betas"] = betas
    with pytest.raises((ValueError, TypeError), match="betas"):
        optimizer.step()
    assert_same_bits(tensors_of(optimizer), before)


def test_mode_that_empties_the_groups_in_the_middle_of_a_step(backend):
    class Empties(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            optimizer.param_groups[0]["params"].clear()
            optimizer.state.clear()
            return func(*args, **(kwargs or {}))

    runs = []
    for mode in (False, True):
        params = make_params([(20,), (4, 5)], device=backend.device)
        optimizer = backend.make(fusedopt.FusedAdam, params)
        for seed in range(3):
            set_grads(params, seed)
            params[1].grad = params[1].grad.t().contiguous().t()  # to be copied in the step
            if mode and seed == 2:
                with Empties():
                    optimizer._plan.step(
                        optimizer.param_groups,
                        optimizer.state,
                        *optimizer._step_options("propagate").for_kernels(),
                        control=optimizer._readings(),
                    )
            else:
                optimizer.step()
        runs.append({str(i): param.detach() for i, param in enumerate(params)})
    assert_same_bits(*runs)


def test_step_within_a_step(backend):
    class Steps:
        def __float__(self):
            optimizer.step()
            return 0.1

    (param,) = make_params([(20,)], device=backend.device)
    optimizer = backend.make(fusedopt.FusedAdam, [param])
    param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = Steps()
    with pytest.raises((RecursionError, RuntimeError)):
        optimizer.step()


@pytest.mark.parametrize(
    "betas",
    [np.array([0.5, 0.25]), torch.tensor([0.5, 0.25]), memoryview(np.array([0.5, 0.25]))],
    ids=["array", "tensor", "memoryview"],
)
def test_sequences_of_numbers_of_any_type(backend, betas):
    runs = []
    for value in (betas, (0.5, 0.25)):
        (param,) = make_params([(20,)], device=backend.device)
        optimizer = backend.make(fusedopt.FusedAdam, [param])
        optimizer.param_groups[0]["betas"] = value
        plans = set()
        for seed in range(3):
            set_grads([param], seed)
            optimizer.step()
            plans.add(id(optimizer._plan))
        assert len(plans) == 1
        runs.append(tensors_of(optimizer))
    assert_same_bits(*runs)


def test_iterables_of_parameters_of_any_type_need_no_new_plan(backend):
    from collections import UserDict, deque

    for kind in (tuple, deque, torch.nn.ParameterList, lambda ps: dict.fromkeys(ps).keys()):
        params = make_params([(20,), (4, 5)], device=backend.device)
        optimizer = backend.make(fusedopt.FusedAdam, params)
        optimizer.param_groups[0]["params"] = kind(params)
        optimizer.state = UserDict(optimizer.state)
        optimizer.param_groups = tuple(optimizer.param_groups)
        plans = set()
        for seed in range(3):
            set_grads(params, seed)
            optimizer.step()
            plans.add(id(optimizer._plan))
        assert len(plans) == 1 and optimizer.state[params[1]]["step"] == 3


# --- other threads, and the end of the process
def run_alone(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


def test_another_thread_that_resizes_a_storage_while_a_step_runs():
    code = """
import threading, torch, fusedopt
p = torch.nn.Parameter(torch.zeros(20_000_000)); p.grad = torch.ones_like(p)
optimizer = fusedopt.FusedAdam([p], max_grad_norm=1.0); optimizer.step()
done, refused = False, 0
def resize():
    global refused
    while not done:
        for tensor in (p, optimizer.state[p]["exp_avg"], p.grad):
            size = tensor.untyped_storage().nbytes()
            try: tensor.untyped_storage().resize_(0)
            except RuntimeError: refused += 1
            else: tensor.untyped_storage().resize_(size)
thread = threading.Thread(target=resize); thread.start()
for _ in range(20):
    try: optimizer.step()
    except RuntimeError as error: assert "storage" in str(error)
done = True; thread.join()
p.untyped_storage().resize_(80_000_000)  # is allowed again
print("refused", refused)
"""
    done = run_alone(code)
    assert done.returncode == 0 and "refused" in done.stdout, done.stdout + done.stderr


def test_exit_while_a_daemon_thread_steps():
    code = """
import threading, time, torch, fusedopt
p = torch.nn.Parameter(torch.zeros(20_000_000)); p.grad = torch.ones_like(p)
optimizer = fusedopt.FusedAdam([p], max_grad_norm=1.0); optimizer.step()
def steps():
    while True: optimizer._fused_step()
threading.Thread(target=steps, daemon=True).start(); time.sleep(0.5)
"""
    # Not step(): torch's own operations, as its wrapper calls them, abort at that time.
    done = run_alone(code)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_plans_made_of_anything():
    code = """
import torch
from fusedopt.core.backends import _C
p = torch.nn.Parameter(torch.ones(3)); s = torch.zeros(3)
group = dict(params=[p], lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0, amsgrad=False,
             maximize=False, decoupled_weight_decay=False)
things = [None, 3, "x", [], {}, [3], [None], [group], [{**group, "params": [3]}], [[p]], {p: 3},
          {p: {"step": 3}}, {p: {"step": s, "exp_avg": 3}}, {p: s}, [s], [s, s], object()]
for groups in things:
    for state in things:
        for counters in ({}, {p: 3}, {p: s}, {3: s}):
            for rings in ([], [s], [s, s], [s.double(), s]):
                for name in ("adam", "sgd", "nothing"):
                    try: plan = _C.Plan(name, "", groups, state, counters, rings)
                    except Exception: continue
                    for control in (s, torch.zeros(7, dtype=torch.float64), s.to("meta")):
                        for value in (None, s, torch.ones(0)):
                            try:
                                plan.step(groups, state, 1.0, True, True, value, value,
                                          None, control)
                            except Exception: pass
                    plan.nonfinite(), plan.shared_memory()
"""
    done = run_alone(code)
    assert done.returncode == 0, done.stderr
