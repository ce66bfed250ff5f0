"""``vlmzip bench``: what compression costs and saves; each subcommand measures one thing."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlmzip.commands import options
from vlmzip.commands.serve import PASS_ON
from vlmzip.progress import note, silence_transformers, working

if TYPE_CHECKING:
    from vlmzip.benchmark.serve_load import Load

bench = typer.Typer(name="bench", help="Measure what compression costs and saves.", no_args_is_help=True)
_LOAD = "Load"


@bench.callback()
def _group() -> None:
    """Measure what compression costs and saves."""


@bench.command(context_settings=PASS_ON)
def serve(
    context: typer.Context,
    shape: Annotated[
        str | None,
        typer.Option(
            help="Random weights of a shape: clip-l-3b (GPUs), small or tiny (CPUs).",
            rich_help_panel="Model (give one)",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="A checkpoint folder, a hub name, or an embedded model.",
            rich_help_panel="Model (give one)",
        ),
    ] = None,
    tokens: options.Tokens = None,
    dominant: options.Dominant = None,
    contextual: options.Contextual = None,
    keep: options.Keep = None,
    total_tokens: options.TotalTokens = None,
    method: options.MethodName = None,
    merge: options.Merge = None,
    order: options.Order = None,
    alone: Annotated[
        int, typer.Option(help="Requests one after the other, a round.", rich_help_panel=_LOAD)
    ] = 3,
    conversations: Annotated[
        int,
        typer.Option(help="Two-turn conversations of the closed loop, a round.", rich_help_panel=_LOAD),
    ] = 8,
    concurrency: Annotated[
        int, typer.Option(help="Conversations open at a time.", rich_help_panel=_LOAD)
    ] = 4,
    arrivals: Annotated[
        int, typer.Option(help="Requests of the open loop, a round.", rich_help_panel=_LOAD)
    ] = 8,
    rate: Annotated[
        float | None,
        typer.Option(
            help="Arrivals a second in the open loop (Poisson). Default: 0.7 of what the stock server "
            "did in its first closed loop.",
            rich_help_panel=_LOAD,
        ),
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens of an answer.", rich_help_panel=_LOAD)] = 16,
    seed: Annotated[
        int, typer.Option(help="Images, questions and arrivals follow from it.", rich_help_panel=_LOAD)
    ] = 0,
    rounds: Annotated[int, typer.Option(help="How often stock and compressed take turns.")] = 2,
    together: Annotated[
        bool,
        typer.Option(
            "--together", help="Start both servers once, instead of one at a time in every round."
        ),
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Drive a stock and a compressed vLLM server with the same load, and report the ratios.

    Every other option goes to both `vllm serve`: --dtype, --max-model-len, --tensor-parallel-size ...
    """
    from vlmzip.benchmark.serve_load import Load

    if (shape is None) == (model is None):
        raise ValueError("give exactly one of --shape and --model")
    if rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {rounds}")
    load = Load(alone, conversations, concurrency, arrivals, rate, new_tokens, seed)
    _check_words(context.args)
    chosen = options.build_method(
        method,
        tokens=tokens,
        dominant=dominant,
        contextual=contextual,
        keep=keep,
        total_tokens=total_tokens,
        merge=merge,
        order=order,
    ) or options.build_method("visionzip")
    silence_transformers()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        document = _measure(
            model, shape, chosen, context.args, load, folder, rounds=rounds, together=together
        )
    if as_json:
        options.print_json(document)
    else:
        _print_report(document)


def _check_words(words: list[str]) -> None:
    names = {word.partition("=")[0].replace("_", "-") for word in words if word.startswith("--")}
    if taken := sorted(names & {"--port", "--host", "--served-model-name", "--hf-overrides", "--model"}):
        raise ValueError(f"option {taken[0]} is set by the benchmark; leave it out")


def _measure(
    model: str | None,
    shape: str | None,
    chosen: Any,
    words: list[str],
    load: "Load",
    folder: Path,
    *,
    rounds: int,
    together: bool,
) -> dict[str, Any]:
    from vlmzip.benchmark.serve import compare
    from vlmzip.vllm.engine import check_installed, make_plan

    check_installed()
    if shape is not None:
        from vlmzip.benchmark.random_llava import write

        with working("writing random weights"):
            write(shape, folder / "model", _dtype(words))
        model = str(folder / "model")
    assert model is not None
    plan = make_plan(model, chosen)
    if plan.stored:
        raise ValueError(f"{model} stores a compression of its own; give the uncompressed checkpoint")
    head = {"model": shape or model, "vlmzip": plan.settings, "options": words}
    return head | compare(plan, words, load, rounds=rounds, together=together, folder=folder, say=note)


def _dtype(words: list[str]) -> str:
    """The dtype that the servers are given, for the weights to have it too."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, _, value = word.partition("=")
        if name == "--dtype":
            return value or following
    return "bfloat16"


_ROWS = {
    "prompt_tokens": ("prompt tokens", ".0f"),
    "ttft_alone_ms": ("first token alone, ms", ".0f"),
    "ttft_turn_1_ms": ("first token, turn 1, ms", ".0f"),
    "ttft_turn_1_p90_ms": ("  90th percentile", ".0f"),
    "ttft_turn_2_ms": ("first token, turn 2, ms", ".0f"),
    "turn_2_cached_share": ("  of the prompt cached", ".0%"),
    "time_per_output_token_ms": ("time per output token, ms", ".1f"),
    "requests_per_second": ("requests a second", ".2f"),
    "ttft_open_ms": ("first token, open loop, ms", ".0f"),
    "ttft_open_p90_ms": ("  90th percentile", ".0f"),
    "kv_blocks_in_use": ("KV blocks in use, most", ".0f"),
}


def _print_report(document: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("")
    for column in ("stock", "compressed", "ratio"):
        table.add_column(column, justify="right")
    for name, (label, form) in _ROWS.items():
        ratio = document["ratios"].get(name)
        cells = [format(document[side][name], form) for side in ("stock", "compressed")]
        table.add_row(*map(Text, (label, *cells, "" if ratio is None else f"{ratio:.2f} x")))
    console = Console(highlight=False)
    console.print(table)
    ideal, load = document["ideal"], document["load"]
    settings = ", ".join(f"{key}={value}" for key, value in document["vlmzip"].items())
    console.print(
        f"\nFirst token alone: {ideal['measured_ttft_ratio']:.2f} x measured, "
        f"{ideal['ideal_ttft_ratio']:.2f} x ideal ({ideal['share_of_ideal']:.0%}); the image's own "
        f"part is {ideal['image_share_of_stock']:.0%} of the stock time.",
        markup=False,
    )
    console.print(
        f"{document['model']}, {settings}; {document['rounds']} rounds; open loop at "
        f"{load['rate']:.2f} requests a second; both: vllm serve {' '.join(document['options'])}",
        style="dim",
        markup=False,
    )
