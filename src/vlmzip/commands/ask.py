"""``vlmzip ask``: ask a model about an image, with few image tokens and, to compare, with all."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlmzip.commands import options
from vlmzip.progress import note, silence_transformers, working

if TYPE_CHECKING:
    from vlmzip import Method
    from vlmzip.asking import Answer

MEASURED = (
    "median time from the processor's output to the first token: vision tower, compression, LLM prefill; "
    "opening and preprocessing the image are not counted"
)
# Seconds that the timed runs may take, at least one run and at most MOST_RUNS.
PATIENCE = 10.0
MOST_RUNS = 7


def ask(
    image: Annotated[
        Path, typer.Argument(metavar="IMAGE", help="An image file of any kind that Pillow reads.")
    ],
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What to ask about it.")],
    model: options.Model = "tiny-llava",
    tokens: options.Tokens = None,
    dominant: options.Dominant = None,
    contextual: options.Contextual = None,
    keep: options.Keep = None,
    total_tokens: options.TotalTokens = None,
    method: options.MethodName = None,
    merge: options.Merge = None,
    order: options.Order = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also ask without compression, side by side.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens that an answer may have.")] = 64,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Ask a model about an image with its image tokens compressed.

    Prints the answer, the image tokens with and without compression, and the time to the first token.
    """
    if max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, got {max_new_tokens}")
    if not question.strip():
        raise ValueError("the question is empty; ask something about the image")
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
    silence_transformers()
    with working("loading the model"):
        from vlmzip.loading import load

        loaded, processor = load(model, dtype, device)
    chosen = options.settle_method(chosen, loaded)
    report = _ask(loaded, processor, picture.image, question, chosen, compare, max_new_tokens)
    report = {"model": model, "image": str(image), "question": question} | report
    if as_json:
        options.print_json(report)
    else:
        _print_report(report)


def _ask(
    model: Any,
    processor: Any,
    image: Any,
    question: str,
    method: "Method | None",
    compare: bool,
    max_new_tokens: int,
) -> dict[str, Any]:
    """Answer and measure; the part of the JSON document that is measured."""
    from vlmzip.asking import Side, check_length, prepare, prompt_for, time_in_turn
    from vlmzip.compress import compress

    prompt = prompt_for(processor, question)
    with working("preparing the image"):
        stock_inputs = prepare(processor, image, prompt, model)
        with compress(model, processor, method) as zipped:
            inputs = prepare(processor, image, prompt, model)
            method = zipped.method
    sides = [Side(model, method, inputs)]
    if compare:
        sides.append(Side(model, None, stock_inputs))
    for side in sides:
        check_length(model, side.inputs, max_new_tokens)
    with working("answering"):
        answers = [side.answer(processor, max_new_tokens) for side in sides]
    with working("timing the first token"):
        times, runs = time_in_turn(sides, PATIENCE, MOST_RUNS)
    ids = stock_inputs["input_ids"]
    stock: dict[str, Any] = {
        "image_tokens": int((ids == model.config.image_token_id).sum()),
        "prompt_tokens": ids.shape[1],
    }
    if compare:
        stock = _figures(answers[1], times[1])
    return {
        "method": method.settings(),
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "compressed": _figures(answers[0], times[0]),
        "uncompressed": stock,
        "timing": {"measured": MEASURED, "runs": runs, "warm_up_runs": 1},
    }


def _figures(answer: "Answer", milliseconds: float) -> dict[str, Any]:
    figures = asdict(answer)
    return {"answer": figures.pop("text"), **figures, "first_token_ms": round(milliseconds, 3)}


def _print_report(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    few, all_ = report["compressed"], report["uncompressed"]
    compare = "answer" in all_
    table = Table(box=None, show_header=compare, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("", style="bold", no_wrap=True)
    table.add_column("compressed")
    if compare:
        table.add_column("all image tokens")
        table.add_column("ratio", justify="right")
    for name, label in (
        ("answer", "answer"),
        ("image_tokens", "image tokens"),
        ("prompt_tokens", "prompt tokens"),
        ("first_token_ms", "first token, ms"),
    ):
        cells = [_cell(few[name])]
        if compare:
            cells.append(_cell(all_[name]))
            cells.append("" if name == "answer" else f"{all_[name] / few[name]:.2f} x")
        elif name in all_:
            cells[0] += f" of {all_[name]}"
        table.add_row(label, *map(Text, cells))
    console = Console(highlight=False)
    console.print(table)
    timing = report["timing"]
    console.print(
        f"\n{_describe(report)}. Time: {timing['measured']}; {timing['runs']} runs after a warm-up"
        f"{', taken in turn' if compare else ''}.",
        style="dim",
        markup=False,
    )


def _cell(value: str | int | float) -> str:
    if isinstance(value, float):
        return f"{value:.1f}"
    return str(value) or "(empty)"


def _describe(report: dict[str, Any]) -> str:
    name = report["method"]["method"]
    settings = ", ".join(
        f"{key}={f'{value:.3g}' if isinstance(value, float) else value}"
        for key, value in report["method"].items()
        if key != "method"
    )
    return f"{report['model']}, {report['dtype']} on {report['device']}, {name} {settings}"
