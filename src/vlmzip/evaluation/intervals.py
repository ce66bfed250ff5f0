"""How far a measured share, or a difference of two shares, can be off by the choice of questions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Difference", "Share", "paired_difference", "wilson"]

_Z = 1.959963984540054  # the normal distribution's 97.5 % point


@dataclass(frozen=True)
class Share:
    """A share with its 95 % interval, all in 0..1, of n trials."""

    share: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Difference:
    """A difference of two shares with its 95 % interval, all in -1..1."""

    difference: float
    low: float
    high: float


def wilson(right: int, n: int) -> Share:
    """The share right / n with Wilson's score interval (Wilson, JASA 1927).

    Raises:
        ValueError: n is under 1, or right is not within 0..n.
    """
    if n < 1 or not 0 <= right <= n:
        raise ValueError(f"cannot count {right} right answers of {n}; give 0 <= right <= n, n >= 1")
    share = right / n
    middle = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    reach = _Z / (1 + _Z**2 / n) * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    # At 0 and 1 the bounds are 0 and 1 exactly; rounding must not put them beyond the share.
    low = 0.0 if right == 0 else middle - reach
    high = 1.0 if right == n else middle + reach
    return Share(share, low, high, n)


def paired_difference(ours: Sequence[bool], theirs: Sequence[bool]) -> Difference:
    """How much larger our share is, both on the same questions, with its 95 % interval.

    The interval is Bonett and Price's (Journal of Educational and Behavioral Statistics 37, 2012):
    only the questions count on which the two differ. Narrower than the two intervals suggest, since
    both answer the same questions.

    Raises:
        ValueError: The two are empty or not equally long.
    """
    n = len(ours)
    if n != len(theirs) or n == 0:
        raise ValueError(f"got {n} and {len(theirs)} answers; give as many of both, and at least one")
    won = sum(a and not b for a, b in zip(ours, theirs, strict=True))
    lost = sum(b and not a for a, b in zip(ours, theirs, strict=True))
    more, less = (won + 1) / (n + 2), (lost + 1) / (n + 2)
    reach = _Z * math.sqrt((more + less - (more - less) ** 2) / (n + 2))
    middle = more - less
    return Difference((won - lost) / n, max(-1.0, middle - reach), min(1.0, middle + reach))
