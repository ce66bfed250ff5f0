"""Qwen3-VL: as Qwen2-VL, with DeepStack features and a time stamp before each frame of a video."""

from dataclasses import dataclass, replace
from typing import ClassVar

from vlmzip.families.base import Card, register
from vlmzip.families.qwen2_vl import Qwen2VL


@register
@dataclass(frozen=True)
class Qwen3VL(Qwen2VL):
    """K = min(budget, n) of the n merged tokens of an image, or of each frame of a video.

    DeepStack features, which the first layers of the language model add to their tokens, are kept and
    merged exactly as the tokens that they belong to. On ``merge``, see
    :class:`vlmzip.families.qwen2_vl.Qwen2VL`.
    """

    name: ClassVar[str] = "qwen3_vl"
    processor_class: ClassVar[str] = "Qwen3VLProcessor"
    card: ClassVar[Card] = replace(
        Qwen2VL.card,
        models="Qwen3-VL",
        compressed="after the patch merger, DeepStack features alike; positions (M-RoPE) as uncompressed",
    )
