"""Whether a tower's attention finds what a scene shows: a training figure, not a training signal."""

from __future__ import annotations

from typing import Any

import torch

from vlmzip.compress_tower import compress_tower
from vlmzip.methods.visionzip import VisionZip

from .labels import LabelledImages, by_head
from .scenes import SHAPES
from .stage import Figures
from .tower import FEATURE_LAYER, pixels

__all__ = ["focus"]


@torch.no_grad()
def focus(tower: Any, held_out: LabelledImages, tokens: int = 16, count: int = 100) -> Figures:
    """How well VisionZip's dominant tokens, at so many tokens an image, cover the first images.

    "hits" is the share of them that lie on an object or a sign, "hits_random" the same for tokens
    drawn evenly; "found" is the share of objects and signs with at least one dominant token,
    "found_random" its expectation for as many random tokens; "top5" is the share of all attention
    that the top 5 % of the patches get.
    """
    with compress_tower(tower, VisionZip(tokens=tokens), layer=FEATURE_LAYER) as compressed:
        out = compressed(pixels(torch.from_numpy(held_out.images[:count].copy())))
    assert out.scores is not None  # a tower's output always has them
    labels = by_head(torch.from_numpy(held_out.labels[:count]))
    # instances are told apart by colour and shape, which no two objects of a scene share
    instance = labels["colour"] * len(SHAPES) + labels["kind"]
    instance = torch.where(labels["kind"] == len(SHAPES), 1000, instance)
    first = out.scores.shape[1] - instance.shape[1]  # 1 if there is a CLS token
    chosen = out.dominant[:, first:] - first
    picked = instance.gather(1, chosen)
    found, by_chance = [], []
    n, k = instance.shape[1], chosen.shape[1]
    for row, kept in zip(instance, picked, strict=True):
        for thing in row[row >= 0].unique():
            size = int((row == thing).sum())
            found.append(float((kept == thing).any()))
            by_chance.append(1.0 - float(torch.prod(1 - size / (n - torch.arange(k)))))
    attention = out.scores[:, first:].float().sort(descending=True).values
    top = attention[:, : round(0.05 * n)].sum(1) / attention.sum(1)
    return {
        "hits": round(float((picked >= 0).float().mean()), 3),
        "hits_random": round(float((instance >= 0).float().mean()), 3),
        "found": round(sum(found) / len(found), 3),
        "found_random": round(sum(by_chance) / len(by_chance), 3),
        "top5": round(float(top.mean()), 3),
    }
