"""Uniformly spaced tokens: a baseline that covers the image evenly."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmzip.merging import ZipOutput, keep_tokens
from vlmzip.methods.base import Grid, Method, register


@register
@dataclass(frozen=True, kw_only=True)
class Uniform(Method):
    """Keep the patches at the centres of k equal stretches of the raster; CLS, if sent on, too."""

    name: ClassVar[str] = "uniform"

    def select(
        self, hidden: Tensor, scores: Tensor, keys: Tensor, grid: Grid, k: int, cls_token: bool
    ) -> ZipOutput:
        """Every (N / k)-th token, half a stretch in."""
        n, first = hidden.shape[1], int(cls_token)
        patches, wanted = n - first, k - first
        place = torch.arange(wanted, device=hidden.device)
        spread = (2 * place + 1) * patches // max(1, 2 * wanted) + first
        kept_K = torch.cat([torch.arange(first, device=hidden.device), spread])
        return keep_tokens(hidden, kept_K.expand(hidden.shape[0], -1))
