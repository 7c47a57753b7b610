"""Checkpoints of other libraries are recognized: dictionaries of their exact layouts.

test_peer_libraries.py checks the layouts of the libraries that are installed.
"""

from __future__ import annotations

import copy

import pytest
import torch
from cases import assert_same_bits, make_params, set_grads, snapshot, tensors_of

import fusedopt

COUNT = 300  # two blocks of bitsandbytes, ten of FlashOptim
TABLE = torch.linspace(-1, 1, 256)
UNSIGNED_TABLE = torch.linspace(0, 1, 256)
WRAPPER = "__bnb_optimizer_quant_state__"


def codes_of(seed, dtype=torch.uint8, shape=(COUNT,)):
    generator = torch.Generator().manual_seed(seed)
    low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    low = -127 if dtype == torch.int8 else low
    return torch.randint(low, high + 1, shape, generator=generator).to(dtype)


def scaled(values, scales, block):
    """Element by element: the block's scale times the value."""
    found = [float(value) * float(scales[i // block]) for i, value in enumerate(values)]
    return torch.tensor(found)


def make(cls=fusedopt.FusedAdamW, dtype=torch.float32, count=COUNT, **options):
    return cls(make_params([(count,)], dtype), backend="reference", **options)


def checkpoint(state, **group):
    return {"state": {0: state}, "param_groups": [{"lr": 0.5, "params": [0], **group}]}


def loaded(state, cls=fusedopt.FusedAdamW, dtype=torch.float32, group=None, **options):
    optimizer = make(cls, dtype, **options)
    saved = checkpoint(state, **(group or {}))
    before = copy.deepcopy(saved)
    optimizer.load_state_dict(saved)
    assert str(saved) == str(before)
    return optimizer, optimizer.state[optimizer.param_groups[0]["params"][0]]


def go_on(optimizer):
    set_grads(optimizer.param_groups[0]["params"], 5)
    optimizer.step()
    assert all(it.isfinite().all() for it in tensors_of(optimizer).values())


# --- bitsandbytes


def bitsandbytes_state():
    return {
        "step": 7,
        "state1": codes_of(1),
        "qmap1": TABLE,
        "absmax1": torch.tensor([0.5, 2.0]),
        "state2": codes_of(2),
        "qmap2": UNSIGNED_TABLE,
        "absmax2": torch.tensor([0.25, 1.0]),
    }


BITSANDBYTES_GROUP = {
    **{"betas": (0.8, 0.99), "eps": 1e-5, "weight_decay": 0.25},
    **{"alpha": 0.0, "t_alpha": None, "t_beta3": None},
}


@pytest.mark.parametrize("wrapped", [False, True], ids=["flat", "wrapped"])
def test_bitsandbytes_of_8_bits(wrapped):
    state = bitsandbytes_state()
    first = scaled(TABLE[state["state1"].int()], state["absmax1"], 256)
    second = scaled(UNSIGNED_TABLE[state["state2"].int()], state["absmax2"], 256)
    if wrapped:
        state = {"step": state.pop("step"), WRAPPER: state}
    optimizer, found = loaded(state, group=BITSANDBYTES_GROUP)
    assert list(found) == ["step", "exp_avg", "exp_avg_sq"] and found["step"] == 7
    torch.testing.assert_close(found["exp_avg"], first, rtol=1e-6, atol=0)
    torch.testing.assert_close(found["exp_avg_sq"], second, rtol=1e-6, atol=0)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (
        *(0.5, (0.8, 0.99), 1e-5, 0.25),
    )
    assert "alpha" not in group and group["decoupled_weight_decay"]
    go_on(optimizer)
    assert optimizer.state_dict()["state"][0]["step"] == 8


def test_the_options_that_a_library_does_not_have_stay():
    optimizer, _ = loaded(
        bitsandbytes_state(), fusedopt.FusedAdam, group=BITSANDBYTES_GROUP, maximize=True
    )
    assert optimizer.param_groups[0]["maximize"]
    optimizer, _ = loaded(
        bitsandbytes_state(),
        fusedopt.FusedAdam,
        group=BITSANDBYTES_GROUP,
        decoupled_weight_decay=True,
    )
    assert optimizer.param_groups[0]["decoupled_weight_decay"]


@pytest.mark.parametrize(
    ("cls", "group", "options", "keys"),
    [
        (fusedopt.FusedLion, {"betas": (0.8, 0.9)}, {"betas": (0.8, 0.9)}, ["exp_avg"]),
        (fusedopt.FusedSGD, {"betas": (0.7, 0.0)}, {"momentum": 0.7}, ["momentum_buffer"]),
        (fusedopt.FusedRMSprop, {"betas": (0.7, 0.0)}, {"alpha": 0.7}, ["step", "square_avg"]),
    ],
    ids=["Lion", "SGD", "RMSprop"],
)
def test_bitsandbytes_with_one_state_of_32_bits(cls, group, options, keys):
    values = torch.rand(COUNT)
    optimizer, found = loaded({"step": 7, "state1": values}, cls, group=group)
    assert list(found) == keys and torch.equal(found[keys[-1]], values)
    assert {key: optimizer.param_groups[0][key] for key in options} == options
    go_on(optimizer)


def test_bitsandbytes_ademamix_has_two_states_in_one():
    scales = torch.tensor([[0.5, 2.0], [3.0, 4.0]])
    state = {**bitsandbytes_state(), "state1": codes_of(3, shape=(2, COUNT)), "absmax1": scales}
    group = {**BITSANDBYTES_GROUP, "betas": (0.9, 0.999, 0.9999), "alpha": 5.0, "t_alpha": 9}
    optimizer, found = loaded(state, fusedopt.FusedAdEMAMix, group=group)
    for name, codes, of_codes in zip(("exp_avg_fast", "exp_avg_slow"), state["state1"], scales):
        expected = scaled(TABLE[codes.int()], of_codes, 256)
        torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=0)
    group = optimizer.param_groups[0]
    assert (group["alpha"], group["alpha_warmup"], group["beta3_warmup"]) == (5.0, 9, 0)
    go_on(optimizer)


# --- torchao


class OptimState8bit(torch.Tensor):
    """As torchao's: shaped as the state, with `codes`, `scale`, `qmap`."""

    @staticmethod
    def __new__(cls, codes, scale, qmap):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.bfloat16)

    def __init__(self, codes, scale, qmap):
        self.codes, self.scale, self.qmap = codes, scale, qmap

    def dequantize(self, output_dtype=None):
        values = self.qmap[self.codes.int()].view(len(self.scale), -1) * self.scale.view(-1, 1)
        return values.view(self.codes.shape)

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(func)


def test_torchao():
    codes, scales = codes_of(4, shape=(512,)), torch.tensor([0.5, 2.0])
    state = {
        "step": torch.tensor(7.0),
        "exp_avg": OptimState8bit(codes, scales, TABLE),
        "exp_avg_sq": torch.rand(512),
    }
    optimizer = make(dtype=torch.bfloat16, count=512)
    group = {"lr": torch.tensor(0.5), "betas": (0.9, 0.999), "amsgrad": False}
    optimizer.load_state_dict(checkpoint(state, **group))
    found = optimizer.state[optimizer.param_groups[0]["params"][0]]
    expected = scaled(TABLE[codes.int()], scales, 256)
    torch.testing.assert_close(found["exp_avg"], expected, rtol=1e-6, atol=0)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert not isinstance(optimizer.param_groups[0]["lr"], torch.Tensor)
    go_on(optimizer)


# --- FlashOptim


def flashoptim_state():
    scales = torch.linspace(0.125, 1.0, 10).half()
    return {
        "step": torch.tensor(7.0),
        "exp_avg::quantized": codes_of(5, torch.int8),
        "exp_avg::scales": scales,
        "exp_avg_sq::quantized": codes_of(6),
        "exp_avg_sq::scales": scales,
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("master_bytes", [3, 4])
def test_flashoptim(dtype, master_bytes):
    state = flashoptim_state()
    params = make_params([(COUNT,)], dtype)
    values = params[0].detach().double()
    errors = codes_of(8, torch.int8 if master_bytes == 3 else torch.int16)
    limit = 127 if master_bytes == 3 else 32767
    errors[0], errors[1] = limit, -limit
    mantissa = 7 if dtype == torch.bfloat16 else 10
    # Below a power of two, a number that rounds to it is nearer than half a unit.
    is_power = params[0].detach().view(torch.int16) & ((1 << mantissa) - 1) == 0
    errors[is_power] = 0
    # Its state_dict gives the errors the parameter's dtype: by value, or by bits.
    saved_errors = errors.to(dtype) if master_bytes == 3 else errors.view(dtype)
    group = {"master_bytewidth": master_bytes, "quantize": True, "initial_lr": 0.25}
    optimizer, found = loaded(
        {**state, "error_bits": saved_errors},
        dtype=dtype,
        group=group,
        master_weights="exact",
        state_dtype=torch.float32,
    )
    shares = [int(code) / 127 for code in state["exp_avg::quantized"]]
    shares = [share / (2 - abs(share)) for share in shares]
    first = scaled(shares, state["exp_avg::scales"], 32)
    torch.testing.assert_close(found["exp_avg"], first, rtol=1e-5, atol=0)
    roots = scaled(state["exp_avg_sq::quantized"] / 255, state["exp_avg_sq::scales"], 32)
    torch.testing.assert_close(found["exp_avg_sq"], roots * roots, rtol=1e-5, atol=0)
    (master,) = fusedopt.master_weights(optimizer).values()
    unit = 2.0 ** (values.abs().log2().floor() - mantissa)
    expected = values + errors.double() / limit * unit / 2
    resolution = torch.maximum(unit * 2.0**-16, values.abs() * 2.0**-23)
    assert ((master - expected).abs() <= resolution).all()
    group = optimizer.param_groups[0]
    assert group["initial_lr"] == 0.25 and "master_bytewidth" not in group
    go_on(optimizer)


def test_flashoptims_states_in_bfloat16():
    state = {
        "step": torch.tensor(7.0),
        "exp_avg": torch.rand(COUNT),
        "exp_avg_sq": torch.ones(COUNT),
    }
    state = {key: it.bfloat16() if it.dim() else it for key, it in state.items()}
    optimizer, found = loaded(state, dtype=torch.bfloat16, group={"master_bytewidth": 0})
    assert torch.equal(found["exp_avg"], state["exp_avg"])
    go_on(optimizer)


# --- float32 masters


def moments():
    return {"exp_avg": torch.rand(COUNT), "exp_avg_sq": torch.rand(COUNT)}


def master_of(param, seed=0):
    """A float32 that is rounded to the parameter."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(param.shape, generator=generator) - 0.5
    values = param.detach().float()
    return values + 0.99 * share * values.abs() * torch.finfo(param.dtype).eps / 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["exact", "24bit"])
def test_transformer_engine(dtype, kind):
    optimizer = make(dtype=dtype, master_weights=kind)
    (param,) = optimizer.param_groups[0]["params"]
    before, master = param.detach().clone(), master_of(param)
    optimizer.load_state_dict(
        checkpoint({**moments(), "master_param": master}, step=7, bias_correction=True)
    )
    assert torch.equal(param, before)
    (found,) = fusedopt.master_weights(optimizer).values()
    units = torch.finfo(dtype).eps * master.abs() * (2.0**-16 if kind == "exact" else 2.0**-8)
    is_exact = kind == "exact" and dtype == torch.bfloat16
    assert torch.equal(found, master) if is_exact else ((found - master).abs() <= units).all()
    assert optimizer.state[param]["step"] == 7 and "step" not in optimizer.param_groups[0]
    go_on(optimizer)


def test_transformer_engines_rest_is_ours():
    """(the bits of the parameter << 16) + rest, in both: see its adam.cu, "Undo rounding"."""
    optimizer = make(dtype=torch.bfloat16, master_weights="exact")
    (param,) = optimizer.param_groups[0]["params"]
    master = master_of(param)
    high, low = master.view(torch.int16).view(-1, 2).unbind(1)[::-1]
    number = (high + (low < 0)).to(torch.int16).view(torch.bfloat16)
    param.data.copy_(number)
    optimizer.load_state_dict(
        checkpoint({**moments(), "master_param": low.clone()}, step=7, bias_correction=True)
    )
    (found,) = fusedopt.master_weights(optimizer).values()
    assert torch.equal(found, master)
    go_on(optimizer)


def test_apex_counts_steps_by_group():
    step = torch.tensor([7], dtype=torch.int32)
    optimizer, found = loaded(moments(), group={"step": step, "bias_correction": True})
    assert found["step"] == 7 and found["step"].dtype == torch.float32
    go_on(optimizer)
    assert optimizer.state_dict()["state"][0]["step"] == 8


def test_apexs_fp16_optimizer():
    optimizer = make(dtype=torch.bfloat16, master_weights="exact")
    (param,) = optimizer.param_groups[0]["params"]
    master = master_of(param)
    inner = checkpoint({"step": 7, **moments()}, bias_correction=True, max_grad_norm=0.0)
    saved = {"cur_scale": 1.0, "optimizer_state_dict": inner, "fp32_groups": [[master]]}
    optimizer.load_state_dict(saved)
    (found,) = fusedopt.master_weights(optimizer).values()
    assert torch.equal(found, master) and optimizer.state[param]["step"] == 7
    assert set(inner["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}
    go_on(optimizer)


def test_a_master_is_left_out_where_none_is_kept():
    state = {**moments(), "master_param": torch.zeros(COUNT), "step": 7}
    for dtype, options in [(torch.bfloat16, {}), (torch.float32, {"master_weights": "exact"})]:
        _, found = loaded(state, dtype=dtype, **options)
        assert found.keys() == {"step", "exp_avg", "exp_avg_sq"}


# --- what is refused


def without(key, state):
    return {name: value for name, value in state.items() if name != key}


REFUSED = {
    "a code without a table": (
        *(without("qmap1", bitsandbytes_state()), {}),
        "state 'state1' of parameter 0 .* its table 'qmap' is NoneType; expected 256 float32",
    ),
    "too few scales": (
        *({**bitsandbytes_state(), "absmax2": torch.ones(1)}, {}),
        r"state 'state2' .* its scales 'absmax' is torch.float32, \(1,\); expected 2 float32",
    ),
    "a strided state": (
        *({"step": 7, "state1": torch.ones(2 * COUNT)[::2], "state2": torch.ones(COUNT)}, {}),
        "state 'state1' of parameter 0 .* has strides",
    ),
    "a missing state": (without("state2", bitsandbytes_state()), {}, "has no 'exp_avg_sq'"),
    "another parameter's": (
        *({**flashoptim_state(), "exp_avg::scales": torch.ones(3)}, {}),
        r"has no scales of shape \(10,\)",
    ),
    "no bias correction": (
        *(moments(), {"step": 7, "bias_correction": False}),
        "param group 0 has bias_correction=False; expected True",
    ),
    "another model's master": (
        *({**moments(), "master_param": torch.ones(COUNT)}, {"step": 7}),
        "the master of parameter 0 .* load the model's weights before the optimizer's state",
    ),
    "a master of another dtype": (
        *({**moments(), "master_param": torch.ones(COUNT).half()}, {"step": 7}),
        "the master of parameter 0 .* is torch.float16; expected torch.float32",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused_and_changes_nothing(what):
    state, group, message = REFUSED[what]
    optimizer = make(dtype=torch.bfloat16, master_weights="exact")
    go_on(optimizer)
    before, groups = snapshot(optimizer), str(optimizer.param_groups)
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
        optimizer.load_state_dict(checkpoint(state, **group))
    assert_same_bits(tensors_of(optimizer), before)
    assert str(optimizer.param_groups) == groups


def test_a_rule_that_bitsandbytes_does_not_have_is_refused():
    with pytest.raises(TypeError, match="of bitsandbytes, whose states fit the rules adam,"):
        make(fusedopt.FusedNAdam).load_state_dict(checkpoint(bitsandbytes_state()))
