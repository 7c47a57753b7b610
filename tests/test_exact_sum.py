"""Sums in limbs are exact: rounded once, as by math.fsum, in any order and from any parts."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusedopt.reference import exact_sum

numbers = st.floats(allow_nan=False, allow_infinity=False)


def limbs_of(terms):
    return exact_sum.to_limbs(torch.tensor(terms, dtype=torch.float64))


def rounded(terms):
    try:
        return float(sum(map(Fraction, terms), Fraction(0)))
    except OverflowError:
        return math.inf if sum(map(Fraction, terms)) > 0 else -math.inf


@given(st.lists(numbers, max_size=40))
def test_the_sum_is_the_exact_one_rounded_once(terms):
    assert exact_sum.from_limbs(limbs_of(terms).tolist()) == rounded(terms)


@given(st.lists(st.floats(0, 1e300), max_size=40))
def test_the_sum_is_that_of_fsum(terms):
    assert exact_sum.exact_sum(torch.tensor(terms, dtype=torch.float64)) == math.fsum(terms)


@given(st.lists(numbers, max_size=20), st.lists(numbers, max_size=20), st.randoms())
def test_order_and_parts_change_no_bit(first, second, random):
    shuffled = first + second
    random.shuffle(shuffled)
    parts = limbs_of(first) + limbs_of(second)
    assert parts.tolist() == limbs_of(shuffled).tolist()


@pytest.mark.parametrize(
    "terms", [[5e-324], [5e-324] * 3, [1.7976931348623157e308], [1.7976931348623157e308] * 2, []]
)
def test_the_ends_of_the_range(terms):
    assert exact_sum.from_limbs(limbs_of(terms).tolist()) == rounded(terms)


def test_inf_and_nan_are_kept():
    assert exact_sum.exact_sum(torch.tensor([1.0, math.inf], dtype=torch.float64)) == math.inf
    assert math.isnan(exact_sum.exact_sum(torch.tensor([math.nan], dtype=torch.float64)))
