"""Second stage, first part: the projector learns to say what a patch shows in the LLM's own words.

As LLaVA's alignment stage does with captions, before the language model itself is trained; here with a
patch's labels, against the word embeddings and without the language model, so it takes a minute.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedTokenizerFast

from .glyphs import WORDS
from .labels import GRID, IGNORE, by_head
from .scenes import COLOURS, SHAPES
from .targets import count_of_things

__all__ = ["Alignment", "whiten"]

_SHARPNESS = 20.0  # of the cosine between a projected patch and a word
_GROUPS = {
    "colour": COLOURS,
    "shape": SHAPES,
    "word": WORDS,
    "column": ("left", "right"),
    "row": ("top", "bottom"),
    "count": ("1", "2", "3", "4", "5"),
}


class Alignment(nn.Module):
    """A projector and the word embeddings it is aligned with."""

    def __init__(self, projector: nn.Module, words: nn.Embedding, tokenizer: PreTrainedTokenizerFast):
        super().__init__()
        self.projector = projector
        self.words = words
        self._ids = {
            group: torch.tensor(
                [tokenizer(f" {name}", add_special_tokens=False).input_ids[-1] for name in names]
            )
            for group, names in _GROUPS.items()
        }

    def loss(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean over the groups of words; features [B, 144, D], labels [B, len(HEADS), 144]."""
        patches = F.normalize(self.projector(features), dim=-1)
        losses = []
        for group, target in _targets(labels).items():
            words = F.normalize(self.words(self._ids[group]), dim=-1)
            scores = _SHARPNESS * patches @ words.T
            losses.append(F.cross_entropy(scores.flatten(0, 1), target.flatten(), ignore_index=IGNORE))
        return torch.stack(losses).nan_to_num().mean()


def _targets(labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """For each group, which word fits each patch, int64 [B, 144], or IGNORE."""
    rows = by_head(labels)
    shown_BN, count_B = count_of_things(labels)

    def within(target: torch.Tensor, limit: int) -> torch.Tensor:
        return target.where((target >= 0) & (target < limit), IGNORE)

    return {
        "colour": rows["colour"],
        "shape": within(rows["kind"], len(SHAPES)),
        "word": within(rows["word"], len(WORDS)),
        "column": (rows["column"] * 2 // GRID).where(shown_BN, IGNORE),
        "row": (rows["row"] * 2 // GRID).where(shown_BN, IGNORE),
        "count": count_B[:, None].where(shown_BN, IGNORE),
    }


@torch.no_grad()
def whiten(projector: nn.Module, features: torch.Tensor) -> None:
    """Start a projector so that all directions of its input, features [n, 144, D], weigh the same.

    What a patch shows moves a tower's features far less than where it stands: without this most of the
    training goes into finding it.
    """
    sample = features[:1500, ::5].float().flatten(0, 1)
    mean = sample.mean(0)
    variance, directions = torch.linalg.eigh(torch.cov((sample - mean).T))
    first: Any = projector.linear_1
    turned = torch.linalg.qr(torch.randn_like(first.weight))[0]
    first.weight.copy_(turned @ torch.diag((variance + 1e-3 * variance.mean()).rsqrt()) @ directions.T)
    first.bias.copy_(-first.weight @ mean)
