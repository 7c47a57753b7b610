"""By the model of `cards`, memory alone bounds the time of every pass on every card, but for
float64 parameters on cards with few float64 units."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from built_kernels import built_kernels
from cards import CARDS, busiest, bytes_of
from sass import Code, loops

ARCHITECTURES = list(dict.fromkeys(card.code for card in CARDS))

# How many times longer than their bytes float64 parameters take, at most: see docs/kernels.md.
FLOAT64 = {"T4": 1.9, "RTX 3090": 2.5, "RTX 4090": 1.2, "B300": 9.6, "RTX 5090": 1.7}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def kernels(request) -> tuple[str, dict[str, Code]]:
    """An architecture, and its kernels of the norm pass and of the update pass."""
    found = built_kernels(request.param)
    main = {n: c for n, c in found.items() if "update_kernel" in n or "grad_norm_kernel" in n}
    assert len(main) >= 4
    return request.param, main


def main_loops(name: str, code: Code) -> Iterator[tuple[list[str], bool]]:
    """The loops over whole rows of a pass, and whether a loop computes in float64."""
    for ops in loops(code):
        stores = any(op.startswith("STG.E.128") for op in ops)
        if bytes_of(ops) >= 64 and stores == ("update_kernel" in name):
            yield ops, any(re.match("D(ADD|MUL|FMA)", op) for op in ops)


def test_memory_bounds_the_time(kernels):
    architecture, main = kernels
    for card in CARDS:
        if card.code != architecture:
            continue
        shares = {False: 0.0, True: 0.0}
        for name, code in main.items():
            for ops, is_float64 in main_loops(name, code):
                share, pipe = busiest(ops, card)
                shares[is_float64] = max(shares[is_float64], share)
                assert is_float64 or share <= 1, f"{card.name}: {pipe} takes {share:.2f}: {name}"
        print(f"{card.name}: {shares[False]:.2f}; float64 parameters: {shares[True]:.2f}")
        assert shares[True] <= FLOAT64.get(card.name, 1.0)
        assert card.name not in FLOAT64 or shares[True] > 1


def test_only_float64_parameters_need_float64_instructions_per_element(kernels):
    """A kernel has a main loop for each case of storage: one of them is for float64."""
    _, main = kernels
    for name, code in main.items():
        in_float64 = [is_float64 for _, is_float64 in main_loops(name, code)]
        assert len(in_float64) >= 3, name
        assert sum(in_float64) <= 1, name


def test_the_norm_takes_at_most_4_float32_instructions_per_element(kernels):
    """Each element is multiplied by itself once: the multiplications tell their number."""
    _, main = kernels
    found = 0
    for name, code in main.items():
        if "grad_norm_kernel" not in name or "SumOfSquares" not in name:
            continue
        for ops, is_float64 in main_loops(name, code):
            if is_float64:
                continue
            found += 1
            count = sum(bool(re.match("F(ADD|MUL|FMA)|H(ADD|MUL|FMA)2", op)) for op in ops)
            assert count <= 4 * ops.count("FMUL"), name
    assert found == 3 * 4  # loops of the four kernels
