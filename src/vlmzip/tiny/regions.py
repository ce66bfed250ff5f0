"""First stage, second part: phrases are tied to the patches that show them.

After the first part a tower names shapes and colours patch by patch, but its pooled output does not yet
tell which colour goes with which shape, so nothing makes its attention look at every object. Here each
patch of an object is matched with the object's phrase (as region-phrase pre-training does), the whole
image with all of its phrases, every patch of an object or sign says how many objects there are, every
patch, background too, where the nearest object lies, and CLS in which columns and rows objects lie. That
is looked up best in one patch of each object, so patches learn before, as detectors do, who is central.

In every second image CLS (SigLIP: the background) is blindfolded before the layer that LLaVA reads, so
that this layer's attention alone must find everything.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .labels import (
    BACKGROUND,
    GRID,
    HEADS,
    count_of_things,
    hearts,
    nearest_centres,
    occupied,
    phrases_of_patches,
)
from .tower import FEATURE_LAYER, WIDTH, TowerLesson, blindfold

__all__ = ["RegionLesson"]

# Beside the first part's tasks, whose weights stay, but for those of the image's phrases.
_WEIGHTS = {"phrases": 0.4, "early phrases": 0.4, "regions": 2.0, "nearest": 1.0,
            "count": 3.0, "centres": 1.0, "hearts": 1.0}  # fmt: skip


class RegionLesson(nn.Module):
    """A lesson that goes on from a :class:`TowerLesson`, with more tasks and phrases."""

    def __init__(self, lesson: TowerLesson, phrases: torch.Tensor) -> None:
        super().__init__()
        self.lesson = lesson
        self.lesson.phrases = phrases
        self.region_norm = nn.LayerNorm(WIDTH)
        self.nearest = nn.Linear(WIDTH, 2 * GRID)
        self.count = nn.Linear(WIDTH, HEADS["rank"])
        if lesson.cls:
            self.centres = nn.Linear(WIDTH, 2 * GRID)
            self.heart = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 1))

    def loss(self, images: torch.Tensor, labels: torch.Tensor, captions: torch.Tensor) -> torch.Tensor:
        """The sum that is minimised; arguments as of :meth:`TowerLesson.losses`."""
        with blindfold(self.lesson.tower, self._blind(labels)):
            seen = self.lesson.see(images)
        hidden_BND = self.lesson.patches(seen.hidden_states[FEATURE_LAYER])
        losses = self.lesson.losses_of(seen, labels, captions)
        losses["regions"] = self._regions(hidden_BND, labels)
        where_B2N = nearest_centres(labels)
        scores = self.nearest(hidden_BND).unflatten(-1, (2, GRID)).movedim(-1, 1)  # [B, 12, 144, 2]
        losses["nearest"] = 2 * F.cross_entropy(scores, where_B2N.mT)
        shown_BN, count_B = count_of_things(labels)
        counted = self.count(self.region_norm(hidden_BND))[shown_BN]
        losses["count"] = F.cross_entropy(counted, count_B[:, None].expand_as(shown_BN)[shown_BN])
        if self.lesson.cls:
            losses["centres"] = self._centres(seen.hidden_states[FEATURE_LAYER][:, 0], labels)
            before_BND = self.lesson.patches(seen.hidden_states[FEATURE_LAYER - 1])
            losses["hearts"] = self._hearts(before_BND, labels)
        return self.lesson.total(losses, **_WEIGHTS)

    def _centres(self, cls_BD: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        wanted = occupied(labels).flatten(1)
        scores = self.centres(self.lesson.early_norm(cls_BD))
        return F.binary_cross_entropy_with_logits(scores, wanted, reduction="sum") / len(labels)

    def _hearts(self, hidden_BND: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        score_BN, wanted_BN = self.heart(hidden_BND)[..., 0], hearts(labels)
        return -(F.logsigmoid(score_BN[wanted_BN]).mean() + F.logsigmoid(-score_BN[~wanted_BN]).mean())

    def _blind(self, labels: torch.Tensor) -> torch.Tensor:
        if self.lesson.cls:
            blind_BN = torch.zeros(len(labels), 1 + GRID * GRID, dtype=torch.bool)
            blind_BN[:, 0] = True
        else:
            blind_BN = labels[:, list(HEADS).index("kind")] == BACKGROUND
        blind_BN[1::2] = False
        return blind_BN

    def _regions(self, hidden_BND: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        phrase_BN = phrases_of_patches(labels)
        known = phrase_BN >= 0
        patches = self.lesson.image_side(self.region_norm(hidden_BND[known]))
        scale = self.lesson.phrase_scale.exp().clamp(max=100)
        logits = F.normalize(patches, dim=-1) @ self.lesson.read(self.lesson.phrases).T * scale
        return F.cross_entropy(logits, phrase_BN[known])
