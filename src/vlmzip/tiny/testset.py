"""The test questions of the embedded models: fixed, balanced, and known by a hash."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .labels import scene_of
from .language import about
from .questions import KINDS, Question, answers_of, ask
from .scenes import Scene, render

__all__ = ["SUBSET", "TEST_HASH", "ExamQuestion", "exam_hash", "exam_questions", "is_right",
           "pair_questions"]  # fmt: skip

PER_KIND = 450
SUBSET = 300  # the first so many questions are the stated subset; every prefix is even over kinds
TEST_HASH = "221ab0d093903cdf14b927ff4266282d17dbe821573760feb9fc21ddd9abed10"


@dataclass(frozen=True)
class ExamQuestion:
    """A question about one or more images of 96 x 96 pixels, its one right answer, and its kind."""

    scenes: tuple[Scene, ...]
    question: str
    answer: str
    kind: str

    @property
    def images(self) -> list[Image.Image]:
        """The images, rendered now: RGB, 96 x 96."""
        return [Image.fromarray(render(scene).image) for scene in self.scenes]


def exam_questions(count: int = PER_KIND * len(KINDS)) -> list[ExamQuestion]:
    """The first count of the 3,150 test questions, kinds taking turns, answers balanced.

    Every question has a scene of its own, from seeds that training never uses. Raises ValueError
    for a count outside 1..3150.
    """
    most = PER_KIND * len(KINDS)
    if not 1 <= count <= most:
        raise ValueError(f"count must be between 1 and {most}, got {count}; ask for fewer questions")
    makers = [_of_kind(kind) for kind in KINDS]
    return [next(makers[i % len(makers)]) for i in range(count)]


def is_right(answer: str, given: str) -> bool:
    """Whether what was given is the answer; case and a final full stop do not matter."""
    return given.strip().removesuffix(".").lower() == answer


def pair_questions(count: int = 350) -> list[ExamQuestion]:
    """Questions about one of two images, made from the test set's own questions in pairs."""
    singles = exam_questions(count)
    result = []
    for i, single in enumerate(singles):
        other, which = singles[(i + 1) % count], i // len(KINDS) % 2
        scenes = (*single.scenes, *other.scenes) if which == 0 else (*other.scenes, *single.scenes)
        text = about(which, single.question)
        result.append(ExamQuestion(scenes, text, single.answer, single.kind))
    return result


def _of_kind(kind: str) -> Iterator[ExamQuestion]:
    index = list(KINDS).index(kind) * 1_000_000
    wanted = answers_of(kind)
    made = 0
    while True:
        answer = wanted[made % len(wanted)] if wanted else None
        scene, question = _try(kind, index, answer)
        index += 1
        if question is not None:
            made += 1
            yield ExamQuestion((scene,), question.text, question.answer, kind)


def _try(kind: str, index: int, answer: str | None) -> tuple[Scene, Question | None]:
    scene = scene_of("test", index)
    return scene, ask(kind, scene, np.random.default_rng([4, index]), answer)


def exam_hash(questions: list[ExamQuestion]) -> str:
    """SHA-256 over the questions' texts, answers and kinds and over their images' bytes."""
    digest = hashlib.sha256()
    for q in questions:
        digest.update(f"{q.question}\n{q.answer}\n{q.kind}\n".encode())
        for scene in q.scenes:
            digest.update(render(scene).image.tobytes())
    return digest.hexdigest()
