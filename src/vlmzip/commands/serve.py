"""``vlmzip serve``: an OpenAI-compatible server by vLLM, compressed or not running at all."""

import os
import shlex
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlmzip.commands import options
from vlmzip.progress import note, silence_transformers, working

if TYPE_CHECKING:
    from vlmzip.vllm.engine import Plan

# Width and height of the image whose placeholders are counted before the start.
SAMPLE = (640, 480)

# What follows MODEL and is not an option of ours goes to vLLM as it stands.
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


def serve(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A checkpoint folder, a hub name, or an embedded model. Comes first."
        ),
    ],
    tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens that a view (image or crop) keeps. Without a budget: what the checkpoint was "
            "saved with.",
            rich_help_panel="Budget (give at most one)",
        ),
    ] = None,
    dominant: options.Dominant = None,
    contextual: options.Contextual = None,
    keep: options.Keep = None,
    total_tokens: options.TotalTokens = None,
    method: options.MethodName = None,
    merge: options.Merge = None,
    order: options.Order = None,
    request_budgets: Annotated[
        bool,
        typer.Option(
            "--request-budgets",
            help='Let requests choose: "mm_processor_kwargs": {"visual_tokens": 32}. Also lets them set '
            "what else vLLM takes there (--trust-request-mm-kwargs).",
            rich_help_panel="Requests",
        ),
    ] = False,
    max_visual_tokens: Annotated[
        int | None,
        typer.Option(
            help="The most tokens a view that a request may choose; goes with --request-budgets. "
            "Default: the server's own budget.",
            rich_help_panel="Requests",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check, print the command, and start nothing.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="With --dry-run: print one JSON document instead.")
    ] = False,
) -> None:
    """Serve a model with its image tokens compressed, by `vllm serve`.

    Every other option goes to `vllm serve`: --port, --dtype, --tensor-parallel-size ... The server runs
    under an architecture name that only vlmzip's plugin registers: without the plugin it does not start.
    """
    _check_words(model, max_visual_tokens, request_budgets, dry_run, as_json)
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
    silence_transformers()
    with working("checking the checkpoint"):
        from vlmzip.vllm.command import QUIET, serve_command
        from vlmzip.vllm.engine import check_installed, make_plan

        plan = make_plan(model, chosen, max_visual_tokens)
        if request_budgets and plan.compression.most is None:
            raise ValueError(
                "--request-budgets with a share or a total needs --max-visual-tokens: the most tokens a "
                "view that a request may choose"
            )
        command = serve_command(plan, context.args, request_budgets=request_budgets)
        sample = count_sample(plan)
    problem: str | None = None
    try:
        check_installed()
    except RuntimeError as error:
        if not dry_run:
            raise
        problem = str(error)
    environment = {name: value for name, value in QUIET.items() if name not in os.environ}
    if as_json:
        document = _document(plan, sample, command, problem)
        options.print_json(document | {"environment": environment})
    elif dry_run:
        typer.echo(_shell(command, environment))
        if problem:
            note(f"it would not start here: {problem}")
    else:
        _print_plan(plan, sample, _shell(command, environment), request_budgets)
        sys.stdout.flush()
        os.execvpe(command[0], command, {**environment, **os.environ})


def count_sample(plan: "Plan") -> dict[str, Any]:
    """Placeholders of one image with and without compression; the processor is checked on the way.

    Raises:
        ValueError: A file of the processor is missing, or it is another model's.
    """
    from PIL import Image

    from vlmzip.loading import load_processor
    from vlmzip.processing import Placeholders, compress_processor

    processor = load_processor(plan.model)
    compression = plan.compression
    compression.family.check_processor(processor, plan.config, compression.method)
    counts = []
    for compressed in (False, True):
        if compressed:
            compress_processor(processor, Placeholders(compression.family, compression.method))
        inputs = processor(images=[Image.new("RGB", SAMPLE)], text=[processor.image_token])
        counts.append([int(token) for token in inputs["input_ids"][0]].count(plan.config.image_token_id))
    return {"width": SAMPLE[0], "height": SAMPLE[1], "image_tokens": counts[1], "stock": counts[0]}


def _check_words(
    model: str, max_visual_tokens: int | None, request_budgets: bool, dry_run: bool, as_json: bool
) -> None:
    if model.startswith("-"):
        raise ValueError(f"MODEL comes before all options, got {model!r} in its place")
    if max_visual_tokens is not None and not request_budgets:
        raise ValueError(
            "--max-visual-tokens bounds what requests choose; give --request-budgets with it"
        )
    if as_json and not dry_run:
        raise ValueError("--json goes with --dry-run; a server prints its own log")


def _document(
    plan: "Plan", sample: dict[str, Any], command: list[str], problem: str | None
) -> dict[str, Any]:
    return {
        "model": plan.model,
        "family": plan.compression.family.name,
        "architecture": plan.architecture,
        "vlmzip": plan.settings,
        "sample": sample,
        "command": command,
        "problem": problem,
    }


def _shell(command: list[str], environment: dict[str, str]) -> str:
    """The line that does the same in a shell."""
    return " ".join([*(f"{name}={value}" for name, value in environment.items()), shlex.join(command)])


def _print_plan(plan: "Plan", sample: dict[str, Any], command: str, request_budgets: bool) -> None:
    settings = ", ".join(f"{key}={value}" for key, value in plan.settings.items())
    budget = "the same for every request"
    if request_budgets:
        budget = f"requests may choose 1 to {plan.compression.most} tokens a view"
    lines = {
        "model": f"{plan.model} ({plan.compression.family.name}, served as {plan.architecture})",
        "method": f"{settings}; {budget}",
        "sample": f"an image of {sample['width']} x {sample['height']} takes {sample['image_tokens']} "
        f"prompt tokens instead of {sample['stock']}",
        "command": command,
    }
    for name, line in lines.items():
        typer.echo(f"{name:<9}{line}")
