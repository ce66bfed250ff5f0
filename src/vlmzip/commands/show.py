"""``vlmzip show``: which image tokens are kept and which are merged into which, as a picture."""

from pathlib import Path
from typing import Annotated, Any

import typer

from vlmzip.commands import options
from vlmzip.progress import note, silence_transformers, working


def show(
    image: Annotated[
        Path, typer.Argument(metavar="IMAGE", help="An image file of any kind that Pillow reads.")
    ],
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="The picture to write: .png, .pdf, .svg or .jpg."),
    ] = None,
    model: options.Model = "tiny-llava",
    tokens: options.Tokens = None,
    dominant: options.Dominant = None,
    contextual: options.Contextual = None,
    keep: options.Keep = None,
    total_tokens: options.TotalTokens = None,
    method: options.MethodName = None,
    merge: options.Merge = None,
    order: options.Order = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Draw which image tokens are dominant, and which are merged into which contextual token.

    --json prints the indices, assignments and scores of every view; then -o may be left out.
    """
    if out is None and not as_json:
        raise ValueError("nothing to write: give -o FILE for a picture or --json for the indices")
    from vlmzip.images import open_image

    picture = open_image(image)
    if picture.frames > 1:
        note(f"{image} has {picture.frames} frames; the first is used")
    chosen = options.build_method(
        method,
        tokens=tokens,
        dominant=dominant,
        contextual=contextual,
        keep=keep,
        total_tokens=total_tokens,
        merge=merge,
        order=order,
    )
    if out is not None:
        _check_out(out, image)
    silence_transformers()
    with working("loading the model"):
        from vlmzip.loading import load

        loaded, processor = load(model, dtype, device)
    chosen = options.settle_method(chosen, loaded)
    with working("encoding the image"):
        settings, selection, views = _encode(loaded, processor, picture.image, chosen)
    if out is not None:
        with working("drawing"):
            from vlmzip.picture import draw

            draw(selection, views, settings, out)
    if as_json:
        document = {"model": model, "image": str(image), "method": settings, "views": _views(selection)}
        options.print_json(document | {"out": None if out is None else str(out)})
    else:
        typer.echo(f"wrote {out}")


def _check_out(out: Path, image: Path) -> None:
    from vlmzip.picture import check_name

    check_name(out)
    if out.exists() and image.exists() and out.samefile(image):
        raise ValueError(f"cannot write {out}: it is the image itself")


def _encode(model: Any, processor: Any, image: Any, method: Any) -> tuple[dict[str, Any], Any, list[Any]]:
    """The settings, what became of the image's tokens, and the views that the model saw."""
    import torch

    from vlmzip.asking import prepare, prompt_for
    from vlmzip.compress import compress
    from vlmzip.picture import seen_views

    prompt = prompt_for(processor, "What is in the image?")
    with compress(model, processor, method) as zipped, torch.no_grad():
        inputs = prepare(processor, image, prompt, model)
        model(**inputs)
        (selection,) = zipped.last
        settings = zipped.method.settings()
    return settings, selection, seen_views(processor, inputs, selection, image)


def _views(selection: Any) -> list[dict[str, Any]]:
    return [
        {
            "grid": list(grid),
            "cls_token": selection.scores.shape[1] > grid[0] * grid[1],
            "dominant": selection.dominant[view].tolist(),
            "contextual": selection.contextual[view].tolist(),
            "assignment": selection.assignment[view].tolist(),
            "scores": selection.scores[view].tolist(),
        }
        for view, grid in enumerate(selection.grid)
    ]
