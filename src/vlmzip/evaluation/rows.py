"""The measurement: every question, answered by every contender through compress() and generate()."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from vlmzip.asking import check_length, generate_batch, prepare_batch, prompt_for
from vlmzip.compress import compress
from vlmzip.methods import Method, from_settings

from .answers import AnswerFile
from .task import Example, Task

__all__ = ["Contender", "Row", "answer", "contenders", "evaluate"]


@dataclass(frozen=True)
class Contender:
    """A method at a budget, or the uncompressed model (no method); tokens a view."""

    name: str
    tokens: int
    method: Method | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What its answers are kept under."""
        return {"method": "none"} if self.method is None else self.method.settings()


@dataclass(frozen=True)
class Row:
    """What a contender got right, question by question, and the questions' kinds."""

    contender: Contender
    right: tuple[bool, ...]
    kinds: tuple[str, ...]


def contenders(
    model: Any,
    processor: Any,
    example: Example,
    names: Sequence[str],
    budgets: Sequence[int] | None,
    seed: int | None = None,
) -> list[Contender]:
    """The uncompressed model, then each method at each budget, all known to fit the model.

    Args:
        model: The model.
        processor: Its processor.
        example: A question whose image shows how many tokens an image has.
        names: Of methods.
        budgets: Tokens a view. None: a third, a ninth and an eighteenth of the image's own.
        seed: For methods that draw at random.

    Raises:
        ValueError: A name or budget is unknown, doubled or does not fit, or no method takes the seed.
    """
    from vlmzip.methods.base import REGISTRY

    _check_list("methods", names)
    own = _image_tokens(model, processor, example, None)
    if budgets is None:
        budgets = sorted({max(1, round(own / part)) for part in (3, 9, 18)}, reverse=True)
    _check_list("tokens", budgets)
    seeded = {name for name in names if name in REGISTRY and "seed" in REGISTRY[name].setting_names()}
    if seed is not None and not seeded:
        raise ValueError(f"none of {', '.join(names)} draws at random; leave the seed out")
    found = [Contender("none", own)]
    for name in names:
        more = {"seed": seed} if name in seeded and seed is not None else {}
        for tokens in budgets:
            method = from_settings({"method": name, "tokens": tokens, **more})
            if _image_tokens(model, processor, example, method) < tokens:
                raise ValueError(
                    f"a budget of {tokens} tokens does not fit: an image has only {own}; give fewer"
                )
            found.append(Contender(name, tokens, method))
    return found


def _check_list(what: str, given: Sequence[Any]) -> None:
    if not given:
        raise ValueError(f"no {what} were given; give at least one")
    if len(set(given)) < len(given):
        raise ValueError(f"one of the {what} was given twice: {', '.join(map(str, given))}")


def _image_tokens(model: Any, processor: Any, example: Example, method: Method | None) -> int:
    """Placeholders that an image gets."""
    with compress(model, processor, method) if method is not None else nullcontext():
        inputs = prepare_batch(
            processor, [example.image], [prompt_for(processor, example.question)], model
        )
    return int((inputs["input_ids"] == model.config.image_token_id).sum())


def evaluate(
    model: Any,
    processor: Any,
    task: Task,
    entrants: Sequence[Contender],
    file: AnswerFile,
    *,
    batch: int = 50,
    progress: Callable[[int], object] = lambda answered: None,
) -> list[Row]:
    """Answer every question with every contender, as far as the file does not hold the answers.

    Contenders take turns batch by batch, so that each image is drawn once for all, and a run that is
    stopped has answered the same questions with each.

    Raises:
        ValueError: ``batch`` is under 1, a prompt is too long, the file holds answers to other
            questions, or the model gave NaN.
    """
    if batch < 1:
        raise ValueError(f"a batch must have at least 1 question, got {batch}")
    keys = [example.key for example in task.examples]
    for part in _batches(processor, task, batch):
        images: dict[int, Image.Image] = {}
        for entrant in entrants:
            missing = [i for i in part if file.get(entrant.settings, i, keys[i]) is None]
            if missing:
                images.update({i: task.examples[i].image for i in missing if i not in images})
                texts = answer(
                    model,
                    processor,
                    [images[i] for i in missing],
                    [task.examples[i].question for i in missing],
                    entrant.method,
                    task.max_new_tokens,
                )
                file.add(
                    entrant.settings,
                    [(i, keys[i], text) for i, text in zip(missing, texts, strict=True)],
                )
            progress(len(part))
    return [_row(task, entrant, file, keys) for entrant in entrants]


@torch.inference_mode()
def answer(
    model: Any,
    processor: Any,
    images: Sequence[Image.Image],
    questions: Sequence[str],
    method: Method | None,
    max_new_tokens: int,
) -> list[str]:
    """Greedy answers to a batch of questions about one image each; method None: uncompressed."""
    with compress(model, processor, method) if method is not None else nullcontext():
        prompts = [prompt_for(processor, question) for question in questions]
        inputs = prepare_batch(processor, images, prompts, model)
        check_length(model, inputs, max_new_tokens)
        return generate_batch(model, processor, inputs, max_new_tokens)


def _batches(processor: Any, task: Task, size: int) -> Iterator[list[int]]:
    """Numbers of questions whose texts have equally many tokens, so that little is padded."""
    lengths: dict[int, list[int]] = {}
    for number, ids in enumerate(
        processor.tokenizer([example.question for example in task.examples]).input_ids
    ):
        lengths.setdefault(len(ids), []).append(number)
    for _, numbers in sorted(lengths.items()):
        yield from (numbers[start : start + size] for start in range(0, len(numbers), size))


def _row(task: Task, entrant: Contender, file: AnswerFile, keys: Sequence[str]) -> Row:
    right = []
    for number, example in enumerate(task.examples):
        given = file.get(entrant.settings, number, keys[number])
        assert given is not None
        right.append(task.is_right(example, given))
    return Row(entrant, tuple(right), tuple(example.kind for example in task.examples))
