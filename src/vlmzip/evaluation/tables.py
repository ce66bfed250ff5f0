"""What was measured, as a JSON document and as tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .intervals import Difference, paired_difference, wilson
from .rows import Row

_CAPTION = (
    "In percent; 'of full' is in percent of the uncompressed model's accuracy; 'minus random' is the "
    "difference on the same questions at the same budget, with its 95 % interval."
)

__all__ = ["document", "over", "print_tables"]


def document(model: str, rows: Sequence[Row]) -> dict[str, Any]:
    """The document that ``vlmzip eval --json`` prints; shares are in 0..1."""
    return {"model": model, "rows": [_entry(row) for row in rows]}


def _entry(row: Row) -> dict[str, Any]:
    whole = wilson(sum(row.right), len(row.right))
    by_kind = {
        kind: {"accuracy": sum(marks) / len(marks), "n": len(marks)}
        for kind, marks in _by_kind(row).items()
    }
    return {
        "method": row.contender.name,
        "tokens": row.contender.tokens,
        "accuracy": whole.share,
        "low": whole.low,
        "high": whole.high,
        "n": whole.n,
        "by_kind": by_kind,
    }


def _by_kind(row: Row) -> dict[str, list[bool]]:
    marks: dict[str, list[bool]] = {}
    for kind, right in zip(row.kinds, row.right, strict=True):
        marks.setdefault(kind, []).append(right)
    return marks


def over(rows: Sequence[Row], row: Row, other: str) -> Difference | None:
    """How much better a row is than another method at the same budget; None if there is none."""
    for rival in rows:
        if rival.contender.name == other != row.contender.name != "none" and (
            rival.contender.tokens == row.contender.tokens
        ):
            return paired_difference(row.right, rival.right)
    return None


def print_tables(console: Console, rows: Sequence[Row]) -> None:
    """Accuracy with its interval, in percent of the full model's, and against random; then by kind.

    All in percent, and in 80 columns.
    """
    kinds = list(dict.fromkeys(rows[0].kinds))
    overall = _table(2, "method", "tokens", "accuracy", "95 % interval", "of full", "minus random")
    by_kind = _table(1, "method", "tokens", *kinds)
    best = sum(rows[0].right)
    for row in rows:
        entry = _entry(row)
        name, tokens = Text(entry["method"]), str(entry["tokens"])
        gain = over(rows, row, "random")
        overall.add_row(
            name,
            tokens,
            _percent(entry["accuracy"]),
            f"{_percent(entry['low'])} to {_percent(entry['high'])}",
            _percent(sum(row.right) / best) if best else "",
            "" if gain is None else _signed(gain),
        )
        by_kind.add_row(name, tokens, *(_percent(entry["by_kind"][kind]["accuracy"]) for kind in kinds))
    console.print(overall)
    console.print()
    console.print(by_kind)
    console.print(f"\n{_CAPTION}", style="dim")


def _table(gap: int, first: str, *columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0))
    table.add_column(first, style="bold", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _signed(gain: Difference) -> str:
    return f"{100 * gain.difference:+.1f} ({100 * gain.low:+.1f} to {100 * gain.high:+.1f})"
