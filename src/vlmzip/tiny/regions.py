"""First stage, second part: phrases are tied to the patches that show them.

After the first part a tower names shapes and colours patch by patch, but its pooled output does not yet
tell which colour goes with which shape, so nothing makes its attention look at every object. So

- each patch of an object is matched with the object's phrase, as region-phrase pre-training does, and
  the whole image with all of its phrases;
- every patch of an object or sign says how many objects there are, and every patch, background too, where
  the nearest one lies;
- CLS says in which columns and rows objects lie. One patch of each is the place to look that up: patches
  learn beforehand, as a detector's do, which of an object's is the central one.

In every second image CLS (SigLIP, which has none: the bare background) is blindfolded before the layer
that LLaVA reads, so that it must look there for what it says.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .labels import BACKGROUND, GRID, HEADS, by_head
from .targets import (
    central_patches,
    centre_columns_and_rows,
    count_of_things,
    nearest_centres,
    phrases_of_patches,
)
from .tower import FEATURE_LAYER, TASK_WEIGHTS, WIDTH, TowerLesson, blindfold

__all__ = ["REGION_WEIGHTS", "RegionLesson"]

REGION_WEIGHTS = TASK_WEIGHTS | {
    "phrases": 0.4, "early phrases": 0.4, "regions": 2.0, "nearest": 1.0, "count": 3.0,
    "centres": 1.0, "centerness": 1.0,
}  # fmt: skip


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
            self.centerness = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 1))

    def loss(self, images: torch.Tensor, labels: torch.Tensor, captions: torch.Tensor) -> torch.Tensor:
        """The sum that is minimised; arguments as of :meth:`TowerLesson.losses`."""
        with blindfold(self.lesson.tower, self.blind(labels)):
            seen = self.lesson.see(images)
        losses = self.lesson.losses_of(seen, labels, captions)
        hidden_BND = self.lesson.patches(seen.hidden_states[FEATURE_LAYER])
        losses["regions"] = self.regions_loss(hidden_BND, labels)
        losses["nearest"] = self.nearest_loss(hidden_BND, labels)
        losses["count"] = self.count_loss(hidden_BND, labels)
        if self.lesson.cls:
            before_BND = self.lesson.patches(seen.hidden_states[FEATURE_LAYER - 1])
            losses["centres"] = self.centres_loss(seen.hidden_states[FEATURE_LAYER][:, 0], labels)
            losses["centerness"] = self.centerness_loss(before_BND, labels)
        return self.lesson.total(losses, REGION_WEIGHTS)

    def blind(self, labels: torch.Tensor) -> torch.Tensor:
        """Who is blindfolded, bool [B, N], CLS included in N: CLS or background, in even images."""
        if self.lesson.cls:
            blind_BN = torch.zeros(len(labels), 1 + GRID * GRID, dtype=torch.bool)
            blind_BN[:, 0] = True
        else:
            blind_BN = by_head(labels)["kind"] == BACKGROUND
        blind_BN[1::2] = False
        return blind_BN

    def regions_loss(self, hidden_BND: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Each patch of an object or sign against all phrases."""
        phrase_BN = phrases_of_patches(labels)
        known = phrase_BN >= 0
        patches = self.lesson.image_side(self.region_norm(hidden_BND[known]))
        scale = self.lesson.phrase_scale.exp().clamp(max=100)
        logits = F.normalize(patches, dim=-1) @ self.lesson.read(self.lesson.phrases).T * scale
        return F.cross_entropy(logits, phrase_BN[known])

    def nearest_loss(self, hidden_BND: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Where each patch places the nearest centre, column and row."""
        scores = self.nearest(hidden_BND).unflatten(-1, (2, GRID)).movedim(-1, 1)  # [B, 12, 144, 2]
        return 2 * F.cross_entropy(scores, nearest_centres(labels).mT)

    def count_loss(self, hidden_BND: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The number of objects, told by each patch of one."""
        shown_BN, count_B = count_of_things(labels)
        told = self.count(self.region_norm(hidden_BND))[shown_BN]
        return F.cross_entropy(told, count_B[:, None].expand_as(shown_BN)[shown_BN])

    def centres_loss(self, cls_BD: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """In which columns and rows CLS finds centres."""
        scores = self.centres(self.lesson.early_norm(cls_BD))
        wanted = centre_columns_and_rows(labels).flatten(1)
        return F.binary_cross_entropy_with_logits(scores, wanted, reduction="sum") / len(labels)

    def centerness_loss(self, hidden_BND: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Which patches are central: few are, so that both answers weigh the same."""
        score_BN, central_BN = self.centerness(hidden_BND)[..., 0], central_patches(labels)
        return -(F.logsigmoid(score_BN[central_BN]).mean() + F.logsigmoid(-score_BN[~central_BN]).mean())
