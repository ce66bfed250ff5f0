"""Accuracy of an embedded model on test questions: greedy answers, exact match."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from rich.console import Console
from rich.progress import track
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from . import NAMES, tiny_path
from .scenes import COLOURS, SHAPES
from .testset import ExamQuestion, exam_questions, is_right, pair_questions

__all__ = ["accuracy_table", "answer_all", "blind_accuracy"]


def prompt_of(question: ExamQuestion) -> list[dict[str, Any]]:
    """The question as a chat of one user message, its images first."""
    content: list[dict[str, str]] = [{"type": "image"} for _ in question.scenes]
    return [{"role": "user", "content": [*content, {"type": "text", "text": question.question}]}]


@torch.no_grad()
def answer_all(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    questions: Sequence[ExamQuestion],
    *,
    batch: int = 50,
    blank: bool = False,
) -> list[str]:
    """Greedy answers; with blank, every image is replaced by an even grey one."""
    answers: list[str] = []
    console = Console(stderr=True)  # main() prints a document
    for start in track(range(0, len(questions), batch), description="answers", console=console):
        part = questions[start : start + batch]
        images = [q.images for q in part]
        if blank:
            images = [[Image.new("RGB", i.size, (128, 128, 128)) for i in row] for row in images]
        prompts = [processor.apply_chat_template(prompt_of(q), add_generation_prompt=True) for q in part]
        inputs = processor(images=images, text=prompts, padding=True, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        new = out[:, inputs["input_ids"].shape[1] :]
        answers += [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
    return answers


def accuracy_table(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    questions: Sequence[ExamQuestion],
    *,
    blank: bool = False,
) -> dict[str, Any]:
    """{"accuracy", "n", "by_kind": {kind: {"accuracy", "n"}}}, fractions 0..1."""
    given = answer_all(model, processor, questions, blank=blank)
    return _table(questions, [is_right(q.answer, a) for a, q in zip(given, questions, strict=True)])


def blind_accuracy(questions: Sequence[ExamQuestion]) -> dict[str, Any]:
    """What the best constant answer to every wording gets, the names in it left out.

    It is what somebody reaches who knows how answers are spread but sees no image.
    """
    wordings: dict[str, list[str]] = defaultdict(list)
    for q in questions:
        wordings[_wording(q.question)].append(q.answer)
    best = {text: max(sorted(set(given)), key=given.count) for text, given in wordings.items()}
    return _table(questions, [best[_wording(q.question)] == q.answer for q in questions])


def _wording(question: str) -> str:
    return re.sub("|".join((*COLOURS, *SHAPES)), "...", question)


def _table(questions: Sequence[ExamQuestion], right: Sequence[bool]) -> dict[str, Any]:
    kinds: dict[str, list[bool]] = defaultdict(list)
    for question, good in zip(questions, right, strict=True):
        kinds[question.kind].append(good)
    by_kind = {
        kind: {"accuracy": round(sum(marks) / len(marks), 4), "n": len(marks)}
        for kind, marks in kinds.items()
    }
    return {"accuracy": round(sum(right) / len(right), 4), "n": len(right), "by_kind": by_kind}


def main(
    name: Annotated[str, typer.Argument(help=f"One of: {', '.join(NAMES)}.")],
    checkpoint: Annotated[Path | None, typer.Option(help="Another folder than the shipped one.")] = None,
    questions: Annotated[int | None, typer.Option(help="How many of the 3,150 test questions.")] = None,
    blank: Annotated[bool, typer.Option(help="Show grey images instead of the scenes.")] = False,
    pairs: Annotated[
        bool, typer.Option(help="Ask about one of two images (350 questions unless given).")
    ] = False,
    constant: Annotated[bool, typer.Option(help="The best constant answers; no model.")] = False,
) -> None:
    """Print the accuracy by kind of an embedded model on the test questions, as JSON."""
    if name not in NAMES:
        raise typer.BadParameter(f"{name!r} is not one of: {', '.join(NAMES)}")
    if constant and (blank or checkpoint is not None):
        raise typer.BadParameter("--constant asks no model; leave --blank and --checkpoint away")
    make = pair_questions if pairs else exam_questions
    asked = make() if questions is None else make(questions)
    if constant:
        table = blind_accuracy(asked)
    else:
        folder = checkpoint or tiny_path(name)
        model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
        table = accuracy_table(model, LlavaProcessor.from_pretrained(folder), asked, blank=blank)
    typer.echo(json.dumps(table))


if __name__ == "__main__":
    torch.set_num_threads(1)
    typer.run(main)
