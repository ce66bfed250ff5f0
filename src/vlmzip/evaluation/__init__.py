"""Accuracy: a task's questions, answered with and without compression, counted and compared.

Whatever has :class:`Example` objects is a :class:`Task`; the built-in one asks the embedded models'
test questions.
"""

from .answers import AnswerFile
from .fingerprint import fingerprint
from .intervals import Difference, Share, paired_difference, wilson
from .rows import Contender, Row, contenders, evaluate
from .tables import document
from .task import Example, SceneTask, Task

__all__ = [
    "AnswerFile",
    "Contender",
    "Difference",
    "Example",
    "Row",
    "SceneTask",
    "Share",
    "Task",
    "contenders",
    "document",
    "evaluate",
    "fingerprint",
    "paired_difference",
    "wilson",
]
