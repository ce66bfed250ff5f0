"""Intervals against published values, a root search, and simulated measurements."""

import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmzip.evaluation import paired_difference, wilson

Z = NormalDist().inv_cdf(0.975)


def by_bisection(right: int, n: int, outward: float) -> float:
    """The share, on one side of right / n, that the score test at 5 % only just allows."""
    near, far = right / n, outward
    for _ in range(200):
        middle = (near + far) / 2
        allowed = abs(right / n - middle) <= Z * math.sqrt(middle * (1 - middle) / n)
        near, far = (middle, far) if allowed else (near, middle)
    return near


@given(st.integers(1, 4000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_shares_that_the_score_test_allows(counts: tuple[int, int]) -> None:
    right, n = counts
    found = wilson(right, n)
    assert found.share == right / n
    assert found.low == pytest.approx(by_bisection(right, n, 0.0), abs=1e-9)
    assert found.high == pytest.approx(by_bisection(right, n, 1.0), abs=1e-9)
    assert 0 <= found.low <= found.share <= found.high <= 1


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_as_published(right: int, n: int, low: float, high: float) -> None:
    """Newcombe, Statistics in Medicine 17 (1998), table I, method 3."""
    found = wilson(right, n)
    assert (round(found.low, 4), round(found.high, 4)) == (low, high)


@pytest.mark.parametrize("counts", [(0, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_what_cannot_be(counts: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="right answers"):
        wilson(*counts)


@pytest.mark.parametrize(("both", "won", "lost"), [(0.5, 0.3, 0.1), (0.85, 0.05, 0.05), (0.2, 0.02, 0.3)])
@pytest.mark.parametrize("n", [60, 600])
def test_the_paired_interval_covers_the_truth_19_times_in_20(
    both: float, won: float, lost: float, n: int
) -> None:
    rng = np.random.default_rng(0)
    cell = rng.choice(4, size=(1500, n), p=[both, won, lost, 1 - both - won - lost])
    covered = 0
    for row in cell:
        found = paired_difference((row <= 1).tolist(), ((row == 0) | (row == 2)).tolist())
        assert found.difference == pytest.approx(((row == 1).sum() - (row == 2).sum()) / n)
        covered += found.low <= won - lost <= found.high
    assert 0.93 <= covered / len(cell) <= 0.99


def test_the_paired_interval_is_narrower_where_both_are_right_together() -> None:
    ours = [True] * 80 + [False] * 20
    together = paired_difference(ours, [True] * 60 + [False] * 40)
    apart = paired_difference(ours, [False] * 40 + [True] * 60)
    assert together.difference == apart.difference == pytest.approx(0.2)
    assert together.low > 0.05
    assert apart.low < together.low
    assert apart.high > together.high


def test_the_paired_interval_turns_with_its_sides() -> None:
    ours, theirs = [True, True, False, True], [False, True, True, False]
    one, other = paired_difference(ours, theirs), paired_difference(theirs, ours)
    assert (one.difference, one.low, one.high) == (-other.difference, -other.high, -other.low)
    assert -1 <= one.low < one.difference < one.high <= 1


@pytest.mark.parametrize("pair", [([], []), ([True], [True, False])])
def test_the_paired_interval_wants_pairs(pair: tuple[list[bool], list[bool]]) -> None:
    with pytest.raises(ValueError, match="as many of both"):
        paired_difference(*pair)
