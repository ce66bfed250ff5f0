"""What is asked: the small interface of a task, and the built-in one on rendered scenes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol

from PIL import Image

from vlmzip.tiny.testset import SUBSET, TEST_HASH, ExamQuestion, exam_questions, is_right

__all__ = ["MOST", "SUBSET", "Example", "SceneTask", "Task"]

MOST = 3150  # questions of the embedded test set


class Example(Protocol):
    """One question about one image, its right answer, and its kind, by which answers are counted."""

    @property
    def question(self) -> str:
        """The user's text."""
        ...

    @property
    def answer(self) -> str:
        """The right answer."""
        ...

    @property
    def kind(self) -> str:
        """Which group of questions it belongs to."""
        ...

    @property
    def image(self) -> Image.Image:
        """The image, drawn or read now."""
        ...

    @property
    def key(self) -> str:
        """Changes whenever anything that is asked or shown does."""
        ...


class Task(Protocol):
    """Examples, and when an answer to one is right."""

    @property
    def name(self) -> str:
        """Says which version of the task it is."""
        ...

    @property
    def examples(self) -> Sequence[Example]:
        """In an order that stays."""
        ...

    @property
    def max_new_tokens(self) -> int:
        """Tokens that an answer may have."""
        ...

    def is_right(self, example: Example, given: str) -> bool:
        """Whether an answer is right."""
        ...


class SceneTask:
    """The first ``count`` of the embedded models' test questions; exact match.

    Raises:
        ValueError: count is outside 1..3150.
    """

    name = f"vlmzip-scenes-{TEST_HASH}"
    max_new_tokens = 8  # the longest answer has three, and one ends it

    def __init__(self, count: int = MOST) -> None:
        self.examples = [SceneExample(question) for question in exam_questions(count)]

    def is_right(self, example: Example, given: str) -> bool:
        """Whether the answer is the right one; case and a final full stop do not matter."""
        return is_right(example.answer, given)


class SceneExample:
    """A test question; its image is drawn anew each time it is asked for."""

    def __init__(self, asked: ExamQuestion) -> None:
        self._asked = asked
        self.question, self.answer, self.kind = asked.question, asked.answer, asked.kind

    @property
    def key(self) -> str:
        """Of the question and of all that its scene is drawn from."""
        return hashlib.sha256(repr(self._asked).encode()).hexdigest()[:16]

    @property
    def image(self) -> Image.Image:
        """RGB, 96 x 96 pixels."""
        (image,) = self._asked.images
        return image
