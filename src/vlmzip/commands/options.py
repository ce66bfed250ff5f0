"""The options that several verbs share, and the method that they describe."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from vlmzip import Method

_BUDGET = "Budget (give at most one)"
_METHOD = "Method"
_MODEL = "Model"

Tokens = Annotated[
    int | None,
    typer.Option(
        help="Tokens that a view (image, crop or frame) keeps. Default: a ninth of its tokens, rounded "
        "(64 of LLaVA-1.5's 577), or what the checkpoint was saved with.",
        rich_help_panel=_BUDGET,
    ),
]
Dominant = Annotated[
    int | None,
    typer.Option(help="Dominant tokens a view; goes with --contextual.", rich_help_panel=_BUDGET),
]
Contextual = Annotated[
    int | None,
    typer.Option(help="Contextual tokens a view; may be 0.", rich_help_panel=_BUDGET),
]
Keep = Annotated[
    float | None,
    typer.Option(help="Share of each view's tokens, above 0 and up to 1.", rich_help_panel=_BUDGET),
]
TotalTokens = Annotated[
    int | None,
    typer.Option(
        help="Tokens of a whole image, for models that cut it into crops.", rich_help_panel=_BUDGET
    ),
]
MethodName = Annotated[
    str | None,
    typer.Option("--method", help="visionzip (default), random or uniform.", rich_help_panel=_METHOD),
]
Merge = Annotated[
    str | None,
    typer.Option(help="reference (target + mean, default) or average.", rich_help_panel=_METHOD),
]
Order = Annotated[
    str | None,
    typer.Option(help="grouped or raster; default: the model family's.", rich_help_panel=_METHOD),
]
Model = Annotated[
    str,
    typer.Option(
        help="A checkpoint folder of a supported family, a hub name, or an embedded model.",
        rich_help_panel=_MODEL,
    ),
]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.", rich_help_panel=_MODEL)]
Device = Annotated[
    str, typer.Option(help="auto (a GPU if there is one), cpu, cuda:1 ...", rich_help_panel=_MODEL)
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout, nothing else there.")
]


def build_method(method: str | None, **settings: Any) -> "Method | None":
    """The method that the options describe; None if none of them was given.

    Without a budget it keeps a ninth of each view's tokens.

    Raises:
        ValueError: An option is out of range, or the method does not have it.
    """
    from vlmzip.methods import from_settings

    given = {name: value for name, value in settings.items() if value is not None}
    if method is None and not given:
        return None
    if not given.keys() & {"tokens", "dominant", "contextual", "keep", "total_tokens"}:
        given["keep"] = 1 / 9
    return from_settings({"method": method or "visionzip", **given})


def settle_method(method: "Method | None", model: Any) -> "Method | None":
    """Without options: None if the checkpoint has settings of its own, else a ninth of the tokens."""
    if method is None and getattr(model.config, "vlmzip", None) is None:
        return build_method("visionzip")
    return method


def print_json(document: Any) -> None:
    """Print the one JSON document of a verb."""
    typer.echo(json.dumps(document, ensure_ascii=False, allow_nan=False))
