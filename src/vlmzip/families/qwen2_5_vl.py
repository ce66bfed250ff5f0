"""Qwen2.5-VL: as Qwen2-VL, on a tower most of whose blocks attend within windows."""

from dataclasses import dataclass, replace
from typing import ClassVar

from vlmzip.families.base import Card, register
from vlmzip.families.qwen2_vl import Qwen2VL


@register
@dataclass(frozen=True)
class Qwen25VL(Qwen2VL):
    """K = min(budget, n) of the n merged tokens of an image, or of each frame of a video.

    Scores and keys are read at the last block that attends over whole frames, brought back from the
    tower's window order. In the published models that is the last block; if a window block follows, it
    still runs, and its output is what is compressed. On ``merge``, see
    :class:`vlmzip.families.qwen2_vl.Qwen2VL`.
    """

    name: ClassVar[str] = "qwen2_5_vl"
    processor_class: ClassVar[str] = "Qwen2_5_VLProcessor"
    card: ClassVar[Card] = replace(
        Qwen2VL.card,
        models="Qwen2.5-VL",
        tower="ViT, rotary, no CLS; attention within windows, in some blocks within a frame",
        layer="the last of fullatt_block_indexes, usually the last block",
    )
