"""Arrays that are stored in other formats: every backend gives the bits of the reference."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, CLASSES, assert_same_bits, make_params, set_grads, snapshot, tensors_of
from test_parity import run_both

import fusedopt
from fusedopt.reference.formats import (
    STATE_SHIFT,
    RandomBits,
    join,
    rest_beside,
    rounded_at_random,
    split,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMATS = [
    {"state_dtype": torch.float32},
    {"state_dtype": torch.bfloat16, "rounding": "nearest"},
    {"state_dtype": torch.bfloat16, "seed": 7},
    {"master_weights": "exact"},
    {"master_weights": "exact", "state_dtype": torch.float32},
    {"master_weights": "exact", "state_dtype": torch.bfloat16, "seed": 2**64 - 1},
    {"master_weights": "exact", "rounding": "nearest"},
    {"master_weights": "24bit"},
    {"master_weights": "24bit", "state_dtype": torch.float32},
    {"master_weights": "24bit", "state_dtype": torch.bfloat16, "seed": 5},
    {"rounding": "stochastic"},
    {"rounding": "stochastic", "state_dtype": torch.float32},
    {"state_dtype": "8bit", "rounding": "nearest"},
    {"state_dtype": "8bit", "seed": 3},
    {"master_weights": "24bit", "state_dtype": "8bit"},
    {"master_weights": "exact", "state_dtype": "8bit", "seed": 11},
]
IN_BLOCKS = [it for it in FORMATS if it.get("state_dtype") == "8bit"]
# Cases whose options keep a state that can't have 8 bits.
UNCODED = [
    case
    for case in CASES
    if not {*case.cls.rule.tensors} <= case.cls.rule.codings.keys()
    or {"amsgrad", "centered"} & case.kwargs.keys()
]


def allowed(dtype, formats):
    return not (
        dtype == torch.float16
        and formats.get("rounding") == "stochastic"
        and "master_weights" not in formats
    )


COMBINATIONS = [(d, f) for d in DTYPES for f in FORMATS if allowed(d, f)]


def skip_uncoded(case, formats):
    if formats in IN_BLOCKS and case in UNCODED:
        pytest.skip("refused: see test_blocks.py")


def name_of(value):
    if isinstance(value, dict):
        return ",".join(str(it).removeprefix("torch.") for it in value.values())
    return str(value).removeprefix("torch.")


def by_reference(cls, params, **kwargs):
    return cls(params, backend="reference", **kwargs)


combinations = pytest.mark.parametrize(("dtype", "formats"), COMBINATIONS, ids=name_of)


@pytest.mark.racecheck
@combinations
@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_bits(backend, case, dtype, formats):
    skip_uncoded(case, formats)
    run_both(backend, case, dtype, max_grad_norm=1.0, **formats)


@combinations
@pytest.mark.parametrize("case", CLASSES[:1], ids=str)
def test_bits_in_one_pass_with_telemetry(backend, case, dtype, formats):
    shapes = [(555,), (33333,)]
    run_both(backend, case, dtype, shapes=shapes, **formats)
    fused, reference = (
        make(case.cls, make_params(shapes, dtype, backend.device), telemetry=3, **formats)
        for make in (backend.make, by_reference)
    )
    for optimizer in (fused, reference):
        for seed in range(3):
            set_grads(optimizer.param_groups[0]["params"], seed)
            optimizer.step()
    assert_same_bits(tensors_of(fused), tensors_of(reference))
    for found, expected in zip(fused._rings.tensors(), reference._rings.tensors(), strict=True):
        assert expected.isfinite().all() and torch.equal(found, expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bits_of_all_options(backend, case):
    for formats in (FORMATS[5], FORMATS[9], FORMATS[10], *([] if case in UNCODED else IN_BLOCKS)):
        run_both(backend, case, torch.bfloat16, shapes=[(700,)], max_grad_norm=1.0, **formats)


@combinations
def test_bits_of_every_tail(backend, dtype, formats):
    shapes = [(count,) for count in range(1, 64)]
    run_both(backend, CLASSES[0], dtype, shapes=shapes, steps=2, max_grad_norm=1.0, **formats)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, "8bit"], ids=name_of)
@pytest.mark.parametrize("formats", FORMATS[3:10], ids=name_of)
def test_bits_of_strides(backend, state_dtype, formats):
    """Transposed, with gaps, and at addresses that are not aligned."""

    def params():
        values = torch.randn(41, 67, generator=torch.Generator().manual_seed(0)).bfloat16()
        made = (values.clone().t(), torch.stack([values, values], 2)[:, :, 1], values.flatten()[3:])
        return [it.to(backend.device).requires_grad_() for it in made]

    fused = backend.make(fusedopt.FusedAdamW, params(), **{**formats, "state_dtype": state_dtype})
    reference = fusedopt.FusedAdamW(
        params(), backend="reference", **{**formats, "state_dtype": state_dtype}
    )
    for seed in range(3):
        for optimizer in (fused, reference):
            set_grads(optimizer.param_groups[0]["params"], seed)
            optimizer.step()
        assert_same_bits(tensors_of(fused), tensors_of(reference))


@combinations
def test_a_skipped_step_leaves_every_bit(backend, dtype, formats):
    params = make_params([(700,), (33333,)], dtype, backend.device)
    optimizer = backend.make(fusedopt.FusedAdam, params, max_grad_norm=1.0, **formats)
    expected = by_reference(fusedopt.FusedAdam, make_params([(700,), (33333,)], dtype), **formats)
    for seed in range(3):
        set_grads(params, seed)
        if seed == 1:
            params[0].grad[3] = torch.inf
            before = snapshot(optimizer)
        optimizer.step()
        if seed == 1:
            assert optimizer.step_skipped
            assert_same_bits(tensors_of(optimizer), before)
    expected.max_grad_norm = 1.0
    for seed in (0, 2):  # as if there had been no skipped step: the random bits, too
        set_grads(expected.param_groups[0]["params"], seed)
        expected.step()
    found = {key: value.cpu() for key, value in tensors_of(optimizer).items()}
    assert_same_bits(found, tensors_of(expected))


def test_bits_of_groups(backend):
    """Each group has formats of its own, and two of them none."""

    def groups():
        made = [make_params([(70,), (17000,)], torch.bfloat16, backend.device) for _ in range(7)]
        used = (FORMATS[i] for i in (4, 5, 9, 10, 14))
        options = [{}, *used, {"master_weights": None}]
        return [{"params": params, **it} for params, it in zip(made, options)]

    fused = backend.make(fusedopt.FusedAdamW, groups(), state_dtype=torch.bfloat16)
    reference = by_reference(fusedopt.FusedAdamW, groups(), state_dtype=torch.bfloat16)
    for seed in range(3):
        for optimizer in (fused, reference):
            for group in optimizer.param_groups:
                set_grads(group["params"], seed)
            optimizer.step()
        assert_same_bits(tensors_of(fused), tensors_of(reference))
    kept = [set(fused.state[group["params"][0]]) for group in fused.param_groups]
    assert ["param_rest" in keys for keys in kept] == [False, True, True, True, False, True, False]


@pytest.mark.parametrize("seeds", [(0, 0), (0, 1)])
def test_the_seed_decides_the_random_bits(backend, seeds):
    found = []
    for seed in seeds:
        params = make_params([(33333,)], torch.bfloat16, backend.device)
        optimizer = backend.make(fusedopt.FusedAdamW, params, rounding="stochastic", seed=seed)
        set_grads(params, 0)
        optimizer.step()
        found.append(tensors_of(optimizer))
    for name in ("param 0", "exp_avg_sq 0"):
        assert torch.equal(found[0][name], found[1][name]) == (seeds[0] == seeds[1])


def test_stochastic_rounding_is_unbiased():
    """Of 2**20 equal numbers so many go up as their place between two neighbors tells."""
    values = torch.full((2**20,), 1 + 0.3 * 2**-7)
    random = RandomBits(seed=1, step=2, number=3).of(values, STATE_SHIFT)
    up = rounded_at_random(values, torch.bfloat16, random) > 1
    assert abs(up.double().mean() - 0.3) < 5 * (0.3 * 0.7 / 2**20) ** 0.5
    assert abs(random.double().mean() - (2**16 - 1) / 2) < 5 * 2**16 / 12**0.5 / 2**10


@pytest.mark.parametrize(
    ("state_dtype", "rounding"),
    [(torch.bfloat16, "nearest"), (torch.bfloat16, None), ("8bit", None)],
)
def test_second_moments_follow_a_variance_that_falls(state_dtype, rounding):
    """bfloat16 ones rounded to nearest don't: a step takes away less than half a unit."""
    params = make_params([(2000,)])
    optimizer = fusedopt.FusedAdam(params, state_dtype=state_dtype, rounding=rounding)
    wide_params = make_params([(2000,)])
    wide = fusedopt.FusedAdam(wide_params)
    for step in range(3000):
        set_grads(params, step, 1.0 if step < 1000 else 0.1)
        wide_params[0].grad = params[0].grad.clone()
        optimizer.step()
        wide.step()
    states = [fusedopt.convert.to_torch(it)["state"][0] for it in (optimizer, wide)]
    moments = [state["exp_avg_sq"] for state in states]
    ratio = (moments[0].double() / moments[1].double()).mean()
    print(f"{state_dtype}, rounding={rounding}: {ratio:.3f} of a float32 average")
    assert (abs(ratio - 1) < 0.02) == (rounding is None)
    assert rounding is None or ratio > 1.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_rest_beside_a_split_number_is_the_splits(dtype):
    values = torch.randn(2**18) * torch.exp(3 * torch.randn(2**18))
    values = torch.cat([values, torch.tensor([0.0, -0.0, 2.0**-20, -(2.0**-24), 65504.0])])
    number, rest = split(values, dtype)
    found, are_near = rest_beside(values, number)
    assert torch.equal(found, rest) and are_near.all()
    far = number * 1.5
    _, are_near = rest_beside(values, far)
    assert not are_near[far.isfinite() & (number.abs() > 2.0**-10)].any()
    ties = (number.detach().view(torch.int16).int() << 16) + 0x8000
    if dtype == torch.bfloat16:  # rounded to even, as torch rounds
        values = ties.view(torch.float32)
        found, are_near = rest_beside(values, values.bfloat16())
        assert are_near.all()
        joined = join(values.bfloat16(), found).view(torch.int32) - ties
        assert joined.abs().max() <= 1
