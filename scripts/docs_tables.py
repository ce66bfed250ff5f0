"""Write the tables of families and methods into docs/, from what the package says of itself.

``make docs`` runs it; a test fails when a table in docs/ is not what this would write.
"""

from dataclasses import asdict
from inspect import getdoc, getmodule
from pathlib import Path

from vlmzip.families.base import REGISTRY as FAMILIES
from vlmzip.methods.base import REGISTRY as METHODS
from vlmzip.tiny.recipe import Recipe

DOCS = Path(__file__).parent.parent / "docs"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def _first_line(cls: type) -> str:
    return (getdoc(getmodule(cls)) or "").split("\n", 1)[0]


def families() -> str:
    """The families, one row each, from their cards."""
    head = ["`model_type`", "models", "vision tower", "attention of", "compressed", "tokens an image"]
    cards = {name: family.card for name, family in sorted(FAMILIES.items())}
    return table(
        head,
        [
            [f"`{name}`", card.models, card.tower, card.layer, card.compressed, card.count]
            for name, card in cards.items()
        ],
    )


def tested() -> str:
    """What each family was tested with, from their cards."""
    cards = {name: family.card for name, family in sorted(FAMILIES.items())}
    return table(
        ["`model_type`", "tested", "not tested"],
        [[f"`{name}`", card.tested, card.untested] for name, card in cards.items()],
    )


def methods() -> str:
    """The methods, one row each, from the first line of their file's docstring."""
    return table(
        ["`method`", "class", "kind", "what it does"],
        [
            [f"`{name}`", f"`{cls.__name__}`", cls.kind, _first_line(cls)]
            for name, cls in sorted(METHODS.items())
        ],
    )


def recipe() -> str:
    """Every number that the embedded models are trained with."""
    return table(["setting", "value"], [[f"`{k}`", str(v)] for k, v in asdict(Recipe()).items()])


TABLES = {
    ("models.md", "families"): families,
    ("models.md", "tested"): tested,
    ("adding-a-method.md", "methods"): methods,
    ("tiny-models.md", "recipe"): recipe,
}


def filled(text: str, name: str, table: str) -> str:
    """``text`` with ``table`` between the markers of ``name``.

    Raises:
        ValueError: The markers are not there.
    """
    start, end = f"<!-- table: {name} -->\n", "\n<!-- end of table -->"
    head, rest = text.split(start, 1)
    return head + start + table + end + rest.split(end, 1)[1]


def main() -> None:
    """Rewrite every table."""
    for (file, name), table in TABLES.items():
        path = DOCS / file
        path.write_text(filled(path.read_text(), name, table()))


if __name__ == "__main__":
    main()
