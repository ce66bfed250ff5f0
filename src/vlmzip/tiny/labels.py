"""Patch-level labels of scenes, and a cache of rendered images with their labels on disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from .glyphs import GLYPHS, WORDS
from .scenes import COLOURS, PATCH, SHAPES, SIZE, Rendering, Scene, render, sample_scene

__all__ = ["BACKGROUND", "HEADS", "IGNORE", "NUMBERS", "PHRASES", "LabelledImages", "by_head",
           "keep", "patch_labels", "rendered_split", "scene_of"]  # fmt: skip

GRID = SIZE // PATCH
IGNORE = -100
BACKGROUND = len(SHAPES) + 1  # of the "kind" labels
# What every patch is taught, and among how many answers.
HEADS = {
    "kind": BACKGROUND + 1,  # a shape, the sign, or the background
    "colour": len(COLOURS),
    "column": GRID,  # where the centre of the object that the patch belongs to lies
    "row": GRID,
    "rank": 5,  # which object it is, from left to right
    "glyph": len(GLYPHS),
    "word": len(WORDS) + 1,  # the whole sign, read from any of its patches; the last: a number
    "tens": 10,
    "units": 10,
    "own_column": GRID,
    "own_row": GRID,
}
# What an image may show, in words. The numbers come last: each is so rare that a tower learns to name
# them in its second part only, when it can read their digits.
PHRASES = (
    *(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES),
    *(f"sign {word}" for word in WORDS),
    *(f"sign {number}" for number in range(10, 100)),
)
NUMBERS = 90  # how many of them are numbers
SPLITS = {"train": 1, "validation": 2, "test": 3, "pretraining": 5}


def scene_of(split: str, index: int) -> Scene:
    """The scene of an image; splits use disjoint seeds."""
    return sample_scene(np.random.default_rng([SPLITS[split], index]), busy=split == "pretraining")


def patch_labels(scene: Scene, drawn: Rendering) -> npt.NDArray[np.int16]:
    """Labels [len(HEADS), 144] of one image, IGNORE where a head has nothing to say."""
    cover = drawn.cover.reshape(len(drawn.cover), -1)
    owner, most = cover.argmax(axis=0), cover.max(axis=0)
    sign = len(scene.things)
    owner = np.where(most >= 0.2, owner, np.where(most <= 0.06, -1, -2))
    labels = {name: np.full(GRID * GRID, IGNORE, np.int16) for name in HEADS}
    labels["kind"][owner == -1] = BACKGROUND
    for i, thing in enumerate(scene.things):
        mine = owner == i
        labels["kind"][mine] = SHAPES.index(thing.shape)
        labels["colour"][mine] = COLOURS.index(thing.colour)
        labels["column"][mine] = int(thing.x // PATCH)
        labels["row"][mine] = int(thing.y // PATCH)
        labels["rank"][mine] = i
    if scene.sign is not None:
        _label_sign(labels, scene, owner == sign, drawn.slot.reshape(-1))
    patch = np.arange(GRID * GRID)
    labels["own_column"][:], labels["own_row"][:] = patch % GRID, patch // GRID
    return np.stack(list(labels.values()))


def _label_sign(
    labels: dict[str, npt.NDArray[np.int16]],
    scene: Scene,
    mine: npt.NDArray[np.bool_],
    slot: npt.NDArray[np.int8],
) -> None:
    assert scene.sign is not None
    text = scene.sign.text
    labels["kind"][mine] = len(SHAPES)
    labels["column"][mine] = int((scene.sign.x + scene.sign.width / 2) // PATCH)
    labels["row"][mine] = int((scene.sign.y + scene.sign.height / 2) // PATCH)
    for i, letter in enumerate(text):
        labels["glyph"][mine & (slot == i)] = GLYPHS.index(letter)
    if text in WORDS:
        labels["word"][mine] = WORDS.index(text)
    else:
        labels["word"][mine] = len(WORDS)
        labels["tens"][mine], labels["units"][mine] = int(text[0]), int(text[1])


def by_head(labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Labels [B, len(HEADS), 144] as int64 [B, 144] a head."""
    return dict(zip(HEADS, labels.long().unbind(1), strict=True))


@dataclass(frozen=True)
class LabelledImages:
    """images [n, 96, 96, 3] uint8 and labels [n, len(HEADS), 144] int16, mapped from disk."""

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int16]


def rendered_split(
    split: str, count: int, folder: Path, progress: Callable[[int], None] = lambda done: None
) -> LabelledImages:
    """The first count images of a split, rendered once and kept in folder."""
    folder.mkdir(parents=True, exist_ok=True)
    images_file, labels_file = folder / f"{split}-{count}.npy", folder / f"{split}-{count}-labels.npy"
    if not labels_file.exists():
        images = np.empty((count, SIZE, SIZE, 3), np.uint8)
        labels = np.empty((count, len(HEADS), GRID * GRID), np.int16)
        for i in range(count):
            scene = scene_of(split, i)
            drawn = render(scene)
            images[i], labels[i] = drawn.image, patch_labels(scene, drawn)
            progress(i + 1)
        keep(images_file, images)
        keep(labels_file, labels)  # written last: it says that the pair is complete
    return LabelledImages(np.load(images_file, mmap_mode="r"), np.load(labels_file, mmap_mode="r"))


def keep(file: Path, array: npt.NDArray[np.generic]) -> None:
    """Save an array so that whoever reads it meanwhile, or after a crash, sees all of it or nothing."""
    partial = file.with_name(f"{file.stem}.{os.getpid()}.npy")
    np.save(partial, array)
    os.replace(partial, file)
