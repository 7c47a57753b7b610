"""Parameters on several devices take one step together. The emulator simulates the devices."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch
from cases import CLASSES, assert_same_bits, make_params, set_grads, tensors_of
from conftest import emulated

import fusedopt
from fusedopt.clip import Percentile, PerTensor, Unit, ZScore
from fusedopt.core import backends
from fusedopt.reference import Control
from fusedopt.telemetry import Rings

DEVICES = 3
# A tensor's number of elements, modulo the number of devices, is the one that it lies on.
SHAPES = [(4,), (16385,), (0,), (2, 33, 41), (30, 7), (33333,), ()]
LIMITS = [
    None,
    50.0,
    Percentile(50, window=4, warmup=1),
    ZScore(warmup=2),
    PerTensor(warmup=2, warmup_norm=100.0),
    PerTensor(warmup=1, max_norm=500.0),
    Unit(0.5),
    Unit(0.5, max_norm=500.0),
]
SCALES = [1.0, 2.0, math.nan, 8.0, 1.0]


@pytest.fixture
def several_devices(monkeypatch):
    """A function that spreads all tensors from then on over so many simulated devices."""
    monkeypatch.setattr(backends, "_C", emulated())
    set_count = ctypes.CDLL(emulated().__file__).fusedopt_emulator_devices
    yield set_count
    set_count(1)


class RingsOfDevices(Rings):
    """Laid out for the devices that the emulator pretends to have."""

    def resize(self, param_groups):
        if self._owners:
            return
        params = [param for group in param_groups for param in group["params"]]
        owners = {}
        for param in params:
            owners.setdefault(param.numel() % DEVICES, []).append(param)
        super().resize(param_groups)
        whole = next(iter(self.params.values()))
        self.params = {key: whole[:, : len(some)].clone() for key, some in owners.items()}
        self._owners = owners


def set_scaled_grads(params, step):
    """Normal gradients; those of the largest tensor are multiplied by SCALES[step]."""
    set_grads(params, step, 4.0)
    for param in params:
        if param.numel() == 33333:
            param.grad.mul_(SCALES[step])


def train(optimizer, params):
    readings = []
    for step in range(len(SCALES)):
        set_scaled_grads(params, step)
        if step == 1:
            params[3].grad = None
        if step == 3:  # all has to be looked at anew
            params[0].data = params[0].data.clone()
        optimizer.step()
        readings.append(optimizer._readings().clone())
    return torch.stack(readings)


@pytest.mark.parametrize("limit", LIMITS, ids=str)
@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_bits_of_one_device(several_devices, case, limit):
    found = []
    for count in (1, DEVICES):
        several_devices(count)
        params = make_params(SHAPES)
        optimizer = case.cls(params, backend="cuda", max_grad_norm=limit, **case.kwargs)
        readings = train(optimizer, params)
        found.append({**tensors_of(optimizer), "readings": readings})
        if optimizer._own["clip_state"] is not None:
            found[-1]["clip state"] = optimizer._own["clip_state"]
    assert_same_bits(*found)


@pytest.mark.parametrize("limit", LIMITS, ids=str)
def test_telemetry_of_one_device(several_devices, limit):
    found = []
    for count in (1, DEVICES):
        several_devices(count)
        params = make_params(SHAPES)
        optimizer = fusedopt.FusedAdam(params, backend="cuda", max_grad_norm=limit, telemetry=9)
        if count > 1:
            optimizer._rings = RingsOfDevices(9)
        train(optimizer, params)
        found.append(optimizer.telemetry().columns())
    assert_same_bits(*found)
    assert found[0]["step"].tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("limit", LIMITS, ids=str)
def test_unclipped_groups(several_devices, limit):
    found = []
    for count in (1, DEVICES):
        several_devices(count)
        params = make_params(SHAPES)
        groups = [{"params": params[:4]}, {"params": params[4:], "clipped": False}]
        optimizer = fusedopt.FusedAdam(groups, backend="cuda", max_grad_norm=limit)
        readings = train(optimizer, params)
        found.append({**tensors_of(optimizer), "readings": readings})
    assert_same_bits(*found)
    assert found[0]["readings"][2, Control.STEP_SKIPPED] == (limit is not None)


@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_clip_grad_norm(several_devices, norm_type):
    found = []
    for count in (1, DEVICES):
        several_devices(count)
        params = make_params(SHAPES)
        set_scaled_grads(params, 1)
        norm = fusedopt.clip_grad_norm_(params, 10.0, norm_type, backend="cuda")
        found.append({"norm": norm, **{str(i): p.grad for i, p in enumerate(params)}})
    assert found[0]["norm"] > 10
    assert_same_bits(*found)


def test_nonfinite_gradients_of_several_devices_are_named(several_devices):
    several_devices(DEVICES)
    params = make_params(SHAPES)
    optimizer = fusedopt.FusedAdam(params, backend="cuda", nonfinite="raise")
    set_scaled_grads(params, 0)
    params[1].grad[16384] = math.inf
    params[4].grad[29, 6] = math.nan
    with pytest.raises(fusedopt.NonFiniteGradientError) as error:
        optimizer.step()
    assert error.value.names == [f"parameter {i} of param group 0" for i in (1, 4)]
