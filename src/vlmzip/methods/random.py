"""Random tokens: the baseline that any method has to beat."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmzip.budget import check_count
from vlmzip.merging import ZipOutput, keep_tokens
from vlmzip.methods.base import Grid, Method, register


@register
@dataclass(frozen=True, kw_only=True)
class Random(Method):
    """Keep a random subset, the same for every view of N tokens; CLS, if sent on, always.

    Attributes:
        seed: The subset follows from the seed, N and k alone, so that reruns, ranks and caches agree.
    """

    seed: int = 0

    name: ClassVar[str] = "random"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "seed", check_count("seed", self.seed, 0))

    def select(
        self, hidden: Tensor, scores: Tensor, keys: Tensor, grid: Grid, k: int, cls_token: bool
    ) -> ZipOutput:
        """Draw without replacement, uniformly."""
        n, first = hidden.shape[1], int(cls_token)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + n)
        drawn = torch.randperm(n - first, generator=generator)[: k - first].sort().values + first
        kept_K = torch.cat([torch.arange(first), drawn]).to(hidden.device)
        return keep_tokens(hidden, kept_K.expand(hidden.shape[0], -1))
