"""Measure the embedded models and write the tables of docs/tiny-models.md: ``make model-card``.

Answers are kept in a folder, so that a run that was stopped goes on.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from docs_tables import DOCS, filled, table

from vlmzip.tiny import NAMES

CARD = DOCS / "tiny-models.md"


def measured(program: str, *arguments: str) -> Any:
    """What a program beside this Python prints as JSON."""
    command = [Path(sys.executable).with_name(program), *arguments]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def percent(share: float) -> str:
    """One decimal."""
    return f"{100 * share:.1f}"


def kinds(entry: dict[str, Any]) -> list[str]:
    """Accuracy by kind."""
    return [percent(kind["accuracy"]) for kind in entry["by_kind"].values()]


def few_tokens(found: dict[str, Any]) -> str:
    """A model's accuracy, one row a method and budget."""
    rows = found["rows"]
    head = ["method", "tokens", "accuracy", "95 % interval", "of all tokens'", *rows[0]["by_kind"]]
    return table(
        head,
        [
            [
                row["method"],
                str(row["tokens"]),
                percent(row["accuracy"]),
                f"{percent(row['low'])} to {percent(row['high'])}",
                percent(row["accuracy"] / rows[0]["accuracy"]),
                *kinds(row),
            ]
            for row in rows
        ],
    )


def blind(found: dict[str, Any]) -> str:
    """All tokens and blind, one row a model and measure."""
    accuracy = ("python", "-m", "vlmzip.tiny.accuracy")
    constant = measured(*accuracy, NAMES[0], "--constant")
    rows = []
    for name in NAMES:
        rows.append([f"`{name}`", found[name]["rows"][0]])
        rows.append([f"`{name}`, blank", measured(*accuracy, name, "--blank")])
    rows.append(["best constant", constant])
    cells = [[who, percent(entry["accuracy"]), *kinds(entry)] for who, entry in rows]
    return table(["", "all", *constant["by_kind"]], cells)


def main(folder: Path) -> None:
    """Measure, and fill the tables."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for name in NAMES:
        answers = str(folder / f"{name}.jsonl")
        found[name] = measured("vlmzip", "eval", "--model", name, "--json", "--out", answers)
    text = CARD.read_text()
    for name in NAMES:
        text = filled(text, name, few_tokens(found[name]))
    CARD.write_text(filled(text, "blind", blind(found)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
