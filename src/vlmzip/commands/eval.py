"""``vlmzip eval``: accuracy with few image tokens and with all, with intervals and by kind."""

from pathlib import Path
from typing import Annotated

import typer

from vlmzip.commands import options
from vlmzip.progress import counting, note, silence_transformers, working


def evaluate(
    model: options.Model = "tiny-llava",
    methods: Annotated[
        str, typer.Option(help="Methods, with commas between them.")
    ] = "visionzip,random,uniform",
    tokens: Annotated[
        str | None,
        typer.Option(
            help="Budgets in tokens a view, with commas between them. Default: a third, a ninth and an "
            "eighteenth of an image's own (48,16,8 of 144). The uncompressed model is always measured."
        ),
    ] = None,
    questions: Annotated[
        int, typer.Option(help="The first so many of the 3,150 test questions; kinds take turns.")
    ] = 3150,
    seed: Annotated[
        int | None, typer.Option(help="Which tokens the method random draws. Default: 0.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--out",
            "--resume",
            help="Keep the answers in this file, a JSON line each; if it is there, go on with it.",
        ),
    ] = None,
    batch: Annotated[int, typer.Option(help="Questions that are answered at once.")] = 50,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Measure accuracy on the embedded test questions, compressed and not.

    Prints the share of right answers with its 95 % interval for each method and budget, and by kind
    of question.
    """
    names = _words("methods", methods)
    budgets = None if tokens is None else [_number(word) for word in _words("tokens", tokens)]
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise ValueError(f"cannot write {out}: {_why_not(out)}")
    silence_transformers()
    with working("loading the model"):
        from vlmzip import __version__
        from vlmzip.evaluation import AnswerFile, SceneTask, contenders, fingerprint, rows, tables
        from vlmzip.loading import load
        from vlmzip.methods import from_settings

        task = SceneTask(questions)
        for name in names:  # what can be refused before the weights are read
            from_settings({"method": name, "tokens": budgets[0] if budgets else 1})
        loaded, processor = load(model, dtype, device)
        entrants = contenders(loaded, processor, task.examples[0], names, budgets, seed)
        about = {
            "vlmzip": __version__,
            "model": fingerprint(loaded, processor),
            "test set": task.name,
        }
    with AnswerFile(out, about) as file:
        if out is not None and len(file):
            note(f"{out} holds {len(file)} answers already; the run goes on with them")
        with counting("answers", len(entrants) * questions) as progress:
            measured = rows.evaluate(
                loaded, processor, task, entrants, file, batch=batch, progress=progress
            )
    if as_json:
        options.print_json(tables.document(model, measured))
        return
    from rich.console import Console

    console = Console(highlight=False)
    console.print(f"{model}, {questions} questions\n", markup=False)
    tables.print_tables(console, measured)


def _words(option: str, text: str) -> list[str]:
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise ValueError(f"--{option} must be a list with commas, such as a,b; got {text!r}")
    return words


def _number(word: str) -> int:
    try:
        return int(word)
    except ValueError as error:
        raise ValueError(
            f"--tokens must be whole numbers with commas, such as 48,16; got {word!r}"
        ) from error


def _why_not(out: Path) -> str:
    return "it is a folder" if out.is_dir() else f"there is no folder {out.parent}"
