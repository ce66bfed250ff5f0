"""Training dialogues: one to three images, one to twelve turns, written as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedTokenizerFast

from .labels import GRID
from .language import about, turn
from .questions import KINDS, Question, ask
from .scenes import Scene

__all__ = ["DialogueBatch", "DialogueWriter"]

PATCHES = GRID * GRID
SILENT = -100  # what the loss passes over: everything but the answers
_IMAGES = (0.85, 0.1, 0.05)  # share of prompts with one, two and three images
_TURNS = {1: 0.1, 2: 0.1, 3: 0.1, 4: 0.2, 8: 0.25, 12: 0.25}  # share of dialogues by their turns


@dataclass(frozen=True)
class DialogueBatch:
    """input_ids and labels [B, T] (right-padded) and the images of each row [B, images]."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    images: npt.NDArray[np.int64]


class DialogueWriter:
    """Writes dialogues about scenes as the chat template does."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, kinds: Sequence[str] = tuple(KINDS)) -> None:
        self.tokenizer = tokenizer
        self.kinds = tuple(kinds)
        self.image = int(tokenizer.convert_tokens_to_ids("<image>"))
        self.pad, self.end = int(tokenizer.pad_token_id), int(tokenizer.eos_token_id)
        self.encode = lru_cache(maxsize=None)(self._encode)

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False).input_ids)

    def write(
        self, images: Sequence[int], turns: Sequence[tuple[str, str]]
    ) -> tuple[list[int], list[int]]:
        """Ids and labels of one dialogue; turns are (question, answer)."""
        ids = [int(self.tokenizer.bos_token_id), *self.encode("USER: ")]
        for _ in images[:-1]:
            ids += [self.image] * PATCHES + list(self.encode("\n"))
        ids += [self.image] * PATCHES
        labels = [SILENT] * len(ids)
        for i, (question, answer) in enumerate(turns):
            before = self.encode(f"\n{question} ASSISTANT:" if i == 0 else turn(question))
            after = (*self.encode(f" {answer}"), self.end)
            ids += [*before, *after]
            labels += [SILENT] * len(before) + list(after)
        return ids, labels

    def batch(
        self, scenes: Sequence[Scene], chosen: npt.NDArray[np.int64], rng: np.random.Generator
    ) -> DialogueBatch:
        """Dialogues about chosen [B, images] scenes, with fresh random questions."""
        rows = [self._dialogue(scenes, row, rng) for row in chosen]
        longest = max(len(ids) for ids, _ in rows)
        input_ids = torch.full((len(rows), longest), self.pad)
        labels = torch.full((len(rows), longest), SILENT)
        for i, (ids, label) in enumerate(rows):
            input_ids[i, : len(ids)] = torch.tensor(ids)
            labels[i, : len(label)] = torch.tensor(label)
        return DialogueBatch(input_ids, labels, chosen)

    def _dialogue(
        self, scenes: Sequence[Scene], row: npt.NDArray[np.int64], rng: np.random.Generator
    ) -> tuple[list[int], list[int]]:
        turns: list[tuple[str, str]] = []
        asked: set[str] = set()
        count = int(rng.choice(list(_TURNS), p=list(_TURNS.values())))
        while len(turns) < count:
            which = int(rng.integers(len(row)))
            question = self._question(scenes[row[which]], rng)
            text = about(which, question.text) if len(row) > 1 else question.text
            if text not in asked:
                asked.add(text)
                turns.append((text, question.answer))
        return self.write(row.tolist(), turns)

    def _question(self, scene: Scene, rng: np.random.Generator) -> Question:
        while True:
            question = ask(self.kinds[int(rng.integers(len(self.kinds)))], scene, rng)
            if question is not None:
                return question


def images_per_prompt(rng: np.random.Generator) -> int:
    """How many images the prompts of the next batch have."""
    return 1 + int(rng.choice(3, p=_IMAGES))
