"""New states start from the values that torch's start from; schedules follow the step count."""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
import twins
from cases import assert_same_bits, make_params, set_grads, tensors_of

import fusedopt
from fusedopt.reference.arithmetic import exponential, real_power

SHAPES = [(3, 4), (17,)]


def stepped(optimizer, seeds):
    for seed in seeds:
        set_grads([p for group in optimizer.param_groups for p in group["params"]], seed)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adagrad_has_its_state_from_the_start(backend, dtype):
    params, others = (make_params(SHAPES, dtype, backend.device) for _ in range(2))
    fused = backend.make(fusedopt.FusedAdagrad, params, initial_accumulator_value=0.3)
    twin = torch.optim.Adagrad(others, initial_accumulator_value=0.3)
    assert_same_bits(tensors_of(fused), tensors_of(twin))
    assert fused.state_dict()["state"].keys() == twin.state_dict()["state"].keys()
    fused.share_memory()
    late = make_params([(5,)], dtype, backend.device)
    fused.add_param_group({"params": late})
    stepped(fused, [0])
    assert (fused.state[late[0]]["sum"] >= 0.3 - 1e-2).all()


def test_a_skipped_first_step_leaves_adagrads_state(backend):
    params = make_params(SHAPES, device=backend.device)
    fused = backend.make(fusedopt.FusedAdagrad, params, nonfinite="skip")
    before = {name: it.clone() for name, it in tensors_of(fused).items()}
    set_grads(params, 0, scale=math.inf)
    fused.step()
    assert fused.step_skipped
    assert_same_bits(tensors_of(fused), before)


@pytest.mark.parametrize("lr", [0.25, torch.tensor(0.25), torch.tensor([0.25])], ids=str)
@pytest.mark.parametrize("formats", [{}, {"state_dtype": torch.bfloat16}], ids=str)
def test_rprops_step_sizes_start_from_lr(backend, lr, formats):
    params = make_params([(), (17,)], device=backend.device)
    fused = backend.make(fusedopt.FusedRprop, params, lr=lr, **formats)
    before = [p.detach().clone() for p in params]
    stepped(fused, [0])
    for param, old in zip(params, before, strict=True):
        torch.testing.assert_close((param - old).abs(), torch.full_like(old, 0.25))
        assert (fused.state[param]["step_size"] == 0.25).all()


def test_asgds_eta_follows_the_lr_of_the_step_before(backend):
    """As torch's: a scheduler changes lr between steps."""
    pairs = [make_params(SHAPES, torch.float64, backend.device) for _ in range(2)]
    options = {"lambd": 0.2, "alpha": 0.6, "t0": 1.0}
    fused = backend.make(fusedopt.FusedASGD, pairs[0], **options)
    twin = torch.optim.ASGD(pairs[1], foreach=False, **options)
    for step in range(5):
        for optimizer in (fused, twin):
            optimizer.param_groups[0]["lr"] = 0.5 / (1 + step)
            stepped(optimizer, [step])
    torch.testing.assert_close(tensors_of(fused), tensors_of(twin))


AUTHORS = {
    fusedopt.FusedLion: twins.Lion,
    fusedopt.FusedAdEMAMix: twins.AdEMAMix,
    fusedopt.FusedLARS: partial(twins.LARS, momentum=0.9, weight_decay=0.1),
}


@pytest.mark.parametrize("ours", AUTHORS)
def test_checkpoints_of_the_authors_code(ours):
    """They have none of torch's flags, None for no warm-up, and another name of LARS's."""
    twin = AUTHORS[ours]
    theirs = stepped(twin(make_params(SHAPES)), [0])
    checkpoint = copy.deepcopy(theirs.state_dict())
    group = checkpoint["param_groups"][0]
    for key in ("maximize", "foreach", "capturable", "differentiable"):
        del group[key]
    group.update({key: None for key in group if key.endswith("warmup")})
    if "trust_coefficient" in group:
        group["trust_coeff"] = group.pop("trust_coefficient")
    fused = ours([p.detach().clone().requires_grad_() for p in theirs.param_groups[0]["params"]])
    fused.load_state_dict(checkpoint)
    torch.testing.assert_close(tensors_of(stepped(fused, [1])), tensors_of(stepped(theirs, [1])))


def test_the_slow_average_reaches_its_beta_at_the_end_of_the_warmup():
    params = make_params([(8,)], torch.float64)
    betas = (0.9, 0.999, 0.9999)
    fused = fusedopt.FusedAdEMAMix(params, betas=betas, beta3_warmup=4)
    shares = []
    for _ in range(6):
        before = (
            fused.state.get(params[0], {}).get("exp_avg_slow", torch.zeros_like(params[0])).clone()
        )
        params[0].grad = before + 1
        fused.step()
        shares.append(1 - (fused.state[params[0]]["exp_avg_slow"] - before)[0].item())
    half_lives = [1 / math.log(share) for share in shares]
    first, last = 1 / math.log(betas[0]), 1 / math.log(betas[2])
    expected = [first + (last - first) * min(step / 4, 1) for step in range(1, 7)]
    assert half_lives == pytest.approx(expected, rel=1e-9)


def test_powers_against_libm():
    for base in (0.0, 1e-3, 0.7, 1.0, 1.0001, 3.5, 1e9):
        for power in (0.0, 0.1, 0.75, 1.0, 2.5, 7.0, 1e-9):
            assert real_power(base, power) == pytest.approx(base**power, rel=1e-13)
            if base > 0:
                assert real_power(base, -power) == pytest.approx(base**-power, rel=1e-13)
    assert math.isnan(real_power(-1.0, 0.5)) and math.isnan(real_power(2.0, math.nan))
    for exponent in (0.0, -1e-9, -1e-4, -0.1, -0.7, -3.0, -40.0):
        assert exponential(exponent) == pytest.approx(math.exp(exponent), rel=1e-12)
    assert exponential(-math.inf) == exponential(math.nan) == 0
