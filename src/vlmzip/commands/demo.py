"""``vlmzip demo``: the main job on an embedded model, answers with all image tokens and with few."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlmzip.commands import options
from vlmzip.progress import counting, silence_transformers, working

if TYPE_CHECKING:
    from vlmzip.evaluation import Example, Row

FEW = 16
MEASURED = (
    "medians of runs taken in turn after a warm-up. Prefill: the language model reads the prompt. First "
    "token: vision tower, compression and prefill; drawing and preprocessing the image are not counted"
)
# Timed runs of each side of a scene, fewer where they would take more seconds than that.
MOST_RUNS, PATIENCE = 9, 2.0


def demo(
    out: Annotated[
        Path, typer.Option("-o", "--out", help="The picture of token maps to write: .png, .pdf, .svg ...")
    ] = Path("token-map.png"),
    model: options.Model = "tiny-llava",
    as_json: options.Json = False,
) -> None:
    """Show the main job on an embedded model: answers with all image tokens and with few, side by side.

    The first test scene of each kind, a picture of what was kept of them, and accuracy on 300 questions.
    Everything is computed now, from the weights in the package; no network is used.
    """
    from vlmzip.picture import check_name

    check_name(out)
    silence_transformers()
    with working("loading the model"):
        from vlmzip import VisionZip
        from vlmzip.evaluation import AnswerFile, SceneTask, contenders, evaluate
        from vlmzip.evaluation.tables import document
        from vlmzip.evaluation.task import SUBSET
        from vlmzip.loading import load

        loaded, processor = load(model, device="cpu")
        task = SceneTask(SUBSET)
    examples = _first_of_each_kind(task.examples)
    method = VisionZip(tokens=FEW)
    with counting("scenes", len(examples)) as progress:
        scenes = []
        for example in examples:
            scenes.append(_scene(loaded, processor, example, method, task.max_new_tokens))
            progress(1)
    with working("drawing"):
        _draw(loaded, processor, examples, scenes, method, out)
    entrants = contenders(loaded, processor, task.examples[0], ["visionzip", "random"], [FEW])
    with (
        AnswerFile(None, {}) as memory,
        counting("accuracy", SUBSET * len(entrants)) as progress,
    ):
        rows = evaluate(loaded, processor, task, entrants, memory, progress=progress)
    report = document(model, rows)
    if as_json:
        settings = {"method": method.settings(), "scenes": scenes, "picture": str(out)}
        timing = {"measured": MEASURED, "most_runs": MOST_RUNS, "warm_up_runs": 1}
        options.print_json(
            {"model": model, **settings, "timing": timing, "questions": SUBSET, "rows": report["rows"]}
        )
    else:
        _print_report(model, scenes, out, rows)


def _first_of_each_kind(examples: "Sequence[Example]") -> "list[Example]":
    found: dict[str, Example] = {}
    for example in examples:
        found.setdefault(example.kind, example)
    return list(found.values())


def _scene(
    model: Any, processor: Any, example: "Example", method: Any, max_new_tokens: int
) -> dict[str, Any]:
    """Both answers to a question, and what they took."""
    from vlmzip.asking import Side, prepare, prompt_for, time_in_turn
    from vlmzip.compress import compress

    image, prompt = example.image, prompt_for(processor, example.question)
    stock_inputs = prepare(processor, image, prompt, model)
    with compress(model, processor, method):
        inputs = prepare(processor, image, prompt, model)
    sides = [Side(model, None, stock_inputs), Side(model, method, inputs)]
    answers = [side.answer(processor, max_new_tokens) for side in sides]
    with _prefills(model) as prefills:
        first, runs = time_in_turn(sides, PATIENCE, MOST_RUNS)
    timed = prefills[len(sides) :]  # the first round is the warm-up
    figures = [
        {
            "answer": answer.text,
            "image_tokens": answer.image_tokens,
            "prompt_tokens": answer.prompt_tokens,
            "prefill_ms": round(median(timed[number :: len(sides)]), 3),
            "first_token_ms": round(first[number], 3),
        }
        for number, answer in enumerate(answers)
    ]
    asked = {"kind": example.kind, "question": example.question, "right_answer": example.answer}
    return {**asked, "all": figures[0], "few": figures[1], "runs": runs}


@contextmanager
def _prefills(model: Any) -> Iterator[list[float]]:
    """Milliseconds of each forward of the language model while the block runs."""
    times: list[float] = []
    started: list[float] = []
    decoder = model.get_decoder()
    hooks = [
        decoder.register_forward_pre_hook(lambda *_: started.append(time.perf_counter())),
        decoder.register_forward_hook(
            lambda *_: times.append(1000 * (time.perf_counter() - started.pop()))
        ),
    ]
    try:
        yield times
    finally:
        for hook in hooks:
            hook.remove()


def _draw(
    model: Any,
    processor: Any,
    examples: "Sequence[Example]",
    scenes: list[dict[str, Any]],
    method: Any,
    out: Path,
) -> None:
    """One picture of all scenes' token maps."""
    import torch

    from vlmzip.asking import prepare, prompt_for
    from vlmzip.compress import compress
    from vlmzip.picture import draw, seen_views, stacked

    selections, views, titles = [], [], []
    with compress(model, processor, method) as zipped, torch.no_grad():
        for example, scene in zip(examples, scenes, strict=True):
            image = example.image
            inputs = prepare(processor, image, prompt_for(processor, example.question), model)
            model(**inputs)
            selections.append(zipped.last[0])
            views += seen_views(processor, inputs, zipped.last[0], image)
            every, few = (_shown(scene, side) for side in ("all", "few"))
            titles.append(f"{example.question}\nall tokens: {every}; {FEW}: {few}")
        settings = zipped.method.settings()
    draw(stacked(selections), views, settings, out, titles)


def _shown(scene: dict[str, Any], side: str) -> str:
    """An answer as people read it."""
    given: str = scene[side]["answer"]
    return given if given == scene["right_answer"] else f"{given or '(empty)'} (wrong)"


def _print_report(model: str, scenes: list[dict[str, Any]], out: Path, rows: "Sequence[Row]") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from vlmzip.evaluation.tables import print_tables

    console = Console(highlight=False)
    every, few = (scenes[0][side]["image_tokens"] for side in ("all", "few"))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("question")
    for tokens in (every, few):
        table.add_column(f"with {tokens}\ntokens")
    for measure in ("prefill", "first token"):
        table.add_column(f"{measure}, ms\n{every} -> {few}", justify="right", no_wrap=True)
    for scene in scenes:
        times = (
            f"{scene['all'][name]:.1f} -> {scene['few'][name]:.1f}"
            for name in ("prefill_ms", "first_token_ms")
        )
        words = (scene["question"], _shown(scene, "all"), _shown(scene, "few"))
        table.add_row(*map(Text, words), *times)
    console.print(
        f"{model}: the first test scene of each kind, with {every} image tokens and with {few}",
        markup=False,
    )
    console.print()
    console.print(table)
    console.print(f"\nTimes: {MEASURED}.", style="dim")
    console.print(f"Token maps of these scenes: {out}", markup=False)
    console.print(f"\nAccuracy on the first {len(rows[0].right)} test questions:\n")
    print_tables(console, rows)
