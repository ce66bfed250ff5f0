"""How many tokens a view keeps, from its token count alone.

A view is what the vision tower encodes at once: an image, a crop of one, or a video frame. The
processor side sizes its placeholders and the model side selects its tokens by this one rule.
"""

import math
from dataclasses import dataclass
from numbers import Integral, Real


def check_count(name: str, value: object, least: int) -> int:
    """Return ``value`` as an int of at least ``least``.

    Raises:
        ValueError: It is not an integer (a bool does not count as one) or it is smaller.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return int(value)


def split(k: int) -> tuple[int, int]:
    """Split ``k`` tokens into (dominant, contextual) in the paper's proportion of 27 to 5.

    64 gives 54 + 10, 128 gives 108 + 20, 192 gives 162 + 30 (VisionZip, tables 8 and 9).
    """
    k = check_count("k", k, 1)
    dominant = max(1, (27 * k + 16) // 32)
    return dominant, k - dominant


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A budget: exactly one of ``tokens``, ``dominant`` with ``contextual``, ``keep``, ``total_tokens``.

    Attributes:
        tokens: Tokens that a view keeps.
        dominant: Dominant tokens that a view keeps, the CLS token among them; at least 1.
        contextual: Contextual tokens that a view keeps; may be 0.
        keep: Share of each view's tokens, in (0, 1].
        total_tokens: Tokens of a whole image, shared out evenly over the most views it can have.

    Raises:
        ValueError: None or more than one is given, or one is out of range.
    """

    tokens: int | None = None
    dominant: int | None = None
    contextual: int | None = None
    keep: float | None = None
    total_tokens: int | None = None

    def __post_init__(self) -> None:
        pair = self.dominant is not None or self.contextual is not None
        given = [name for name in ("tokens", "keep", "total_tokens") if getattr(self, name) is not None]
        if len(given) + pair != 1:
            shown = ", ".join(given + ["dominant + contextual"] * pair) or "none"
            raise ValueError(
                "give exactly one budget: tokens=, dominant= with contextual=, keep= or "
                f"total_tokens=; got {shown}"
            )
        if pair and (self.dominant is None or self.contextual is None):
            raise ValueError(
                "dominant= and contextual= go together (contextual=0 is allowed), got "
                f"dominant={self.dominant}, contextual={self.contextual}"
            )
        for name, least in (("tokens", 1), ("dominant", 1), ("contextual", 0), ("total_tokens", 2)):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, check_count(name, value, least))
        if self.keep is not None:
            object.__setattr__(self, "keep", _check_share(self.keep))

    def count(self, n: int, *, views: int = 1, dynamic: bool = False) -> int:
        """Return K, the number of tokens that a view of ``n`` tokens keeps.

        Args:
            n: Tokens of the view, the CLS token included where the tower hands one on.
            views: The most views an image can have: 1 + the most crops that the model's grid
                pinpoints allow. Only ``total_tokens`` depends on it.
            dynamic: The model's views differ in size. A view with fewer tokens than the budget then
                keeps all of them; with a fixed size such a budget is refused.

        Raises:
            ValueError: The budget does not fit ``n`` or ``views``, or these are no counts.
        """
        n, views = check_count("n", n, 1), check_count("views", views, 1)
        k = self._wanted(n, views)
        if k <= n:
            return k
        if dynamic:
            return n
        raise ValueError(
            f"a budget of {k} tokens does not fit: a view has only {n} tokens; "
            f"give a budget of {n} or fewer"
        )

    def _wanted(self, n: int, views: int) -> int:
        if self.tokens is not None:
            return self.tokens
        if self.dominant is not None and self.contextual is not None:
            return self.dominant + self.contextual
        if self.keep is not None:
            return max(1, math.floor(self.keep * n + 0.5))
        assert self.total_tokens is not None
        if self.total_tokens < 2 * views:
            raise ValueError(
                f"total_tokens={self.total_tokens} leaves under 2 tokens for each of up to {views} "
                f"views; give at least {2 * views}"
            )
        return self.total_tokens // views

    def split(self, k: int) -> tuple[int, int]:
        """Return (dominant, contextual) of the ``k`` tokens that ``count`` gave.

        A pair that was spelled out is kept; any other count is split by :func:`split`.
        """
        if self.dominant is None or self.contextual is None or self.dominant + self.contextual != k:
            return split(k)
        return self.dominant, self.contextual


def _check_share(keep: object) -> float:
    if isinstance(keep, bool) or not isinstance(keep, Real) or not 0 < float(keep) <= 1:
        raise ValueError(f"keep must be a share in (0, 1], got {keep!r}")
    return float(keep)
