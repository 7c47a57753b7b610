"""Small optimizers with telemetry, for tests that compare every row of a Monitor's outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import fusedopt
from fusedopt import Telemetry
from fusedopt.reference import Control

FORMATS = ["run.jsonl", "run.csv"]


def make(telemetry: int = 8, cls: Any = fusedopt.FusedSGD, **options: Any) -> Any:
    """An optimizer of two named parameters."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    options = {"lr": 0.1, "max_grad_norm": 1.0, "telemetry": telemetry, **options}
    return cls(model.named_parameters(), backend="reference", **options)


def step(opt: Any, grads: str = "random") -> None:
    """One step; grads: "random", "inf", "nan", or "none" for the first parameter."""
    for group in opt.param_groups:
        for param in group["params"]:
            param.grad = torch.randn(param.shape)
    first = opt.param_groups[0]["params"][0]
    if grads == "none":
        first.grad = None
    elif grads != "random":
        first.grad.view(-1)[0] = float(grads)
    opt.step()


class Steps(fusedopt.FusedSGD):
    """Writes rows where a step would compute them: the rest is real, and a million are quick."""

    def _fused_step(self) -> None:
        rings, control = self._rings, self._readings()
        assert rings is not None
        if not rings.params:
            rings.resize(self.param_groups)
        row = int(control[Control.STEPS]) % rings.size
        control[Control.STEPS] += 1
        rings.steps[row] = torch.tensor([3.0, 0.3, 0.0, 0.1])
        for ring in rings.params.values():
            ring[row] = torch.tensor([2.0, 1.0, 0.0, 0.0, 0.5, 4.0])


def assert_logged(logged: Telemetry, expected: Telemetry) -> None:
    """The same, to the digits that a log has."""
    ours, theirs = expected.columns(), logged.columns()
    assert list(ours) == list(theirs)
    for name, column in ours.items():
        if column.is_floating_point():
            torch.testing.assert_close(
                theirs[name], column, rtol=1e-6, atol=0, equal_nan=True, msg=name
            )
        else:
            assert torch.equal(theirs[name], column), name


def assert_rows(logged: Telemetry, expected: Telemetry) -> None:
    for name, param in expected.params.items():
        norm: Tensor = logged.params[name].grad_norm
        torch.testing.assert_close(norm, param.grad_norm, rtol=1e-6, atol=0)


# A process of its own, whose log is its first argument.
SCRIPT = """
import os, sys, time
import torch, fusedopt
torch.set_num_threads(1)
path, what = sys.argv[1:]
param = torch.nn.Parameter(torch.ones(3))
options = dict(lr=1e-3, max_grad_norm=1.0, telemetry=16, backend="reference")
opt = fusedopt.FusedSGD([("weight", param)], **options)
monitor = fusedopt.Monitor(opt, path, every=5)
param.grad = torch.ones(3)
for number in range(1, 100_000):
    opt.step()
    if what == "exit" and number == 8:
        sys.exit()
    if what == "fork" and number == 8:
        if os.fork() == 0:
            opt.step()
            monitor.close()
            sys.exit()
        os.wait()
        sys.exit()
    if number == 20:
        print("running", flush=True)
"""
