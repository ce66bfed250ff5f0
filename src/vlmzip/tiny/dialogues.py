"""Training prompts as token ids: dialogues, and many questions about one image side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
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
_TURNS = {1: 0.25, 2: 0.25, 3: 0.25, 4: 0.25}  # share of dialogues by their turns


@dataclass(frozen=True)
class DialogueBatch:
    """input_ids and labels [B, T] (right-padded) and the images of each row [B, images].

    mask [B or 1, 1, T, T] is True where a token sees another; position_ids are [B, T].
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    images: npt.NDArray[np.int64]
    mask: torch.Tensor
    position_ids: torch.Tensor


class DialogueWriter:
    """Writes dialogues about scenes as the chat template does.

    kinds are those of its questions. Without "existence" it raises ValueError: there are scenes of
    which no other kind has four different questions, and it would look for them for ever.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, kinds: Sequence[str] = tuple(KINDS)) -> None:
        if "existence" not in kinds:
            raise ValueError(f"kinds must have 'existence' among them, got {', '.join(kinds)}")
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
        # The mask is given, since without one transformers takes uneven positions for packed texts.
        mask = torch.ones(1, 1, longest, longest, dtype=torch.bool).tril()
        return DialogueBatch(input_ids, labels, chosen, mask, torch.arange(longest).expand(len(rows), -1))

    def side_by_side(
        self,
        scenes: Sequence[Scene],
        chosen: npt.NDArray[np.int64],
        rng: np.random.Generator,
        questions: int = 16,
    ) -> DialogueBatch:
        """Many first turns about each of chosen [B] scenes, none of which sees another.

        Every question follows its image directly, as if it stood in a prompt of its own: the answer
        must come from the image, and the image is read once.
        """
        rows = [self._singles(scenes[index], rng, questions) for index in chosen]
        longest = max(len(ids) for ids, _, _, _ in rows)
        shape = (len(rows), longest)
        input_ids, labels = torch.full(shape, self.pad), torch.full(shape, SILENT)
        part, place = torch.full(shape, -1), torch.zeros(shape, dtype=torch.long)
        for i, row in enumerate(rows):
            for tensor, values in zip((input_ids, labels, part, place), row, strict=True):
                tensor[i, : len(values)] = torch.tensor(values)
        same = (part[:, None, :] == part[:, :, None]) | (part[:, None, :] == 0)
        mask = (same & torch.ones(longest, longest, dtype=torch.bool).tril())[:, None]
        return DialogueBatch(input_ids, labels, chosen[:, None], mask, place)

    def at_any_distance(
        self, batch: DialogueBatch, least: float, rng: np.random.Generator
    ) -> DialogueBatch:
        """The same with the image tokens of a row nearer to each other (position interpolation).

        Otherwise all images of the training stand equally far from their questions, and the LLM learns
        to count and to tell places by it. Three rows in four have image tokens least (0 < least <= 1)
        to 1 of a position apart, drawn evenly over the logarithm; the others stay as they are.
        """
        rows = len(batch.input_ids)
        step = np.where(rng.random((rows, 1)) < 0.25, 1.0, least ** rng.random((rows, 1)))
        shown = (batch.input_ids == self.image).long()
        nearer = (shown.cumsum(1) - shown) * torch.from_numpy(1 - step).float()
        return replace(batch, position_ids=batch.position_ids - nearer)

    def _singles(
        self, scene: Scene, rng: np.random.Generator, questions: int
    ) -> tuple[list[int], list[int], list[int], list[int]]:
        """Ids, labels, which question a token belongs to (0: the image) and positions of one row."""
        ids, labels = self.write([0], [])
        part, place = [0] * len(ids), list(range(len(ids)))
        start = len(ids)
        for number in range(1, questions + 1):
            question = self._question(scene, rng)
            whole, wanted = self.write([0], [(question.text, question.answer)])
            ids += whole[start:]
            labels += wanted[start:]
            part += [number] * (len(whole) - start)
            place += range(start, len(whole))
        return ids, labels, part, place

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
