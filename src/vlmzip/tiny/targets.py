"""What a tower is asked about an image, from the labels of its patches."""

from __future__ import annotations

import torch

from .glyphs import WORDS
from .labels import GRID, HEADS, IGNORE, NUMBERS, PHRASES, by_head
from .scenes import COLOURS, SHAPES

__all__ = ["central_patches", "centre_columns_and_rows", "count_of_things", "nearest_centres",
           "phrases_of_patches", "phrases_shown"]  # fmt: skip


def phrases_of_patches(labels: torch.Tensor) -> torch.Tensor:
    """Which of PHRASES each patch shows, int64 [B, 144], -1 if none; labels [B, len(HEADS), 144]."""
    rows = by_head(labels)
    kind, colour, word = rows["kind"], rows["colour"], rows["word"]
    tens, units = rows["tens"], rows["units"]
    thing = (kind >= 0) & (kind < len(SHAPES)) & (colour >= 0)
    spelt = (word >= 0) & (word < len(WORDS))
    named = torch.where(thing, colour * len(SHAPES) + kind, -1)
    named = torch.where(spelt, len(COLOURS) * len(SHAPES) + word, named)
    return torch.where(tens >= 0, len(PHRASES) - NUMBERS + 10 * tens + units - 10, named)


def phrases_shown(labels: torch.Tensor) -> torch.Tensor:
    """Which of PHRASES each image shows, float [B, P], from its labels [B, len(HEADS), 144]."""
    phrase_BN = phrases_of_patches(labels)
    nothing = len(PHRASES)
    shown = torch.zeros(len(labels), nothing + 1)
    return shown.scatter_(1, phrase_BN.where(phrase_BN >= 0, nothing), 1.0)[:, :nothing]


def nearest_centres(labels: torch.Tensor) -> torch.Tensor:
    """Column and row of the centre of the object or sign nearest to each patch, int64 [B, 2, 144].

    Nearest is the one with the nearest patch; IGNORE all over an image that shows nothing.
    """
    rows = by_head(labels)
    place = torch.stack([torch.arange(GRID * GRID) % GRID, torch.arange(GRID * GRID) // GRID], dim=1)
    apart_NN = torch.cdist(place.float(), place.float())
    bare_B1N = (rows["column"] == IGNORE)[:, None]
    nearest_BN = (apart_NN + bare_B1N * 1e6).argmin(-1)
    centres_B2N = torch.stack([rows["column"], rows["row"]], dim=1)
    return centres_B2N.gather(2, nearest_BN[:, None].expand(-1, 2, -1))


def centre_columns_and_rows(labels: torch.Tensor) -> torch.Tensor:
    """Which columns and rows hold the centre of an object or sign, float [B, 2, 12]."""
    rows = by_head(labels)
    centres_B2N = torch.stack([rows["column"], rows["row"]], dim=1)
    held = torch.zeros(len(labels), 2, GRID + 1)
    return held.scatter_(2, centres_B2N.where(centres_B2N >= 0, GRID), 1.0)[..., :GRID]


def central_patches(labels: torch.Tensor) -> torch.Tensor:
    """Of every object and sign the patch that lies nearest to its centre, bool [B, 144]."""
    rows = by_head(labels)
    shown_BN = rows["column"] != IGNORE
    sign_BN = shown_BN & (rows["rank"] == IGNORE)
    which_BN = rows["rank"].where(~sign_BN, HEADS["rank"])
    patch = torch.arange(GRID * GRID)
    off_BN = (rows["column"] - patch % GRID) ** 2 + (rows["row"] - patch // GRID) ** 2
    off_BN = (off_BN * len(patch) + patch).where(shown_BN, 2**40)  # of equally near ones the first
    same_BNN = which_BN[:, :, None] == which_BN[:, None, :]
    nearest_BN = off_BN[:, None, :].expand_as(same_BNN).where(same_BNN, 2**40).amin(-1)
    return shown_BN & (off_BN == nearest_BN)


def count_of_things(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which patches show an object or a sign, bool [B, 144], and the number of objects less 1, [B]."""
    rows = by_head(labels)
    return rows["column"] != IGNORE, rows["rank"].amax(1).clamp(min=0)
