"""``python -m vlmzip.mini_gemini CHECKPOINT OUT``: convert a published checkpoint."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from vlmzip.errors import UnsupportedModelError
from vlmzip.mini_gemini.conversion import load_published


def main(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a published Mini-Gemini (MGM).")],
    out: Annotated[Path, typer.Argument(help="Folder to write; made if it is not there.")],
    vision_tower: Annotated[
        Path | None, typer.Option(help="Folder of the CLIP, if the checkpoint does not hold it.")
    ] = None,
    high_vision_tower: Annotated[
        Path | None,
        typer.Option(help="open_clip_pytorch_model.bin of the ConvNeXt, if the checkpoint lacks it."),
    ] = None,
) -> None:
    """Convert a published checkpoint to one that transformers loads once vlmzip is imported."""
    try:
        model, processor = load_published(checkpoint, vision_tower, high_vision_tower)
        model.save_pretrained(out)
        processor.save_pretrained(out)
    except (ValueError, OSError, UnsupportedModelError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    typer.echo(f"wrote {out}")


if __name__ == "__main__":
    typer.run(main)
