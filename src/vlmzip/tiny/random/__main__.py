"""``python -m vlmzip.tiny.random FAMILY OUT``: write a tiny random checkpoint to a folder."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from vlmzip.tiny.random import build


def main(
    family: Annotated[str, typer.Argument(help="A family of `vlmzip models`, such as llava.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; made if it is not there.")],
) -> None:
    """Write a tiny checkpoint with random weights, and its processor, to a folder."""
    try:
        model, processor = build(family)
        model.save_pretrained(out)
        processor.save_pretrained(out)
    except (ValueError, OSError, ImportError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    typer.echo(f"wrote a tiny random {family} to {out}")


if __name__ == "__main__":
    typer.run(main)
