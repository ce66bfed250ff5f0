"""``vlmzip path``: where an embedded model's checkpoint lies."""

from typing import Annotated

import typer

from vlmzip.tiny import NAMES, trained_path


def path(
    name: Annotated[str, typer.Argument(metavar="NAME", help=f"One of: {', '.join(NAMES)}.")],
) -> None:
    """Print the folder of an embedded model's checkpoint, for from_pretrained and vLLM."""
    typer.echo(trained_path(name))
