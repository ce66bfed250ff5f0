"""SmolVLM: Idefics3's layout, and videos whose frames stand in the prompt like images."""

from dataclasses import dataclass
from typing import Any, ClassVar

from transformers.processing_utils import ProcessorMixin

from vlmzip.families.base import Card, check_video_processor, register
from vlmzip.families.idefics3 import Idefics3
from vlmzip.methods.base import Method


@register
@dataclass(frozen=True)
class SmolVLM(Idefics3):
    """K tokens a crop, K for the whole image, K a video frame; timestamps and tags stay.

    Otherwise as :class:`Idefics3`. A frame of a video is an entry of :attr:`Compressed.last`, since the
    prompt has it as a whole image. Images and videos of one processor call are refused, by the model, as
    the stock processor hands on the pixels of the videos only.
    """

    name: ClassVar[str] = "smolvlm"
    processor_class: ClassVar[str] = "SmolVLMProcessor"
    card: ClassVar[Card] = Card(
        models="SmolVLM, SmolVLM2",
        tower="SigLIP-like (no CLS)",
        layer="the last block",
        compressed="after the connector, on tokens merged by its pixel shuffle, every view on its own",
        count="K x (crops + 1), K if the image is not split, K x frames",
        tested="tiny random models, CPU; images, videos, not both in one call (stock loses the images)",
        untested="GPU, FlashAttention kernels, published checkpoints, FSDP, DeepSpeed",
    )

    mismatch: ClassVar[str] = (
        ". If images and videos were given in one processor call: it hands on the videos' pixels only"
    )

    def video_tokens(self, method: Method, stock: int, video_inputs: Any, index: int) -> int:
        """K times the frames of the video."""
        return self.shuffled.views(stock, video_inputs) * self.shuffled.count(method)

    def check_processor(self, processor: ProcessorMixin, config: Any, method: Method) -> None:
        """Check, on a dummy image and a dummy video, that a processor fits this model."""
        super().check_processor(processor, config, method)
        check_video_processor(self, processor, config, method)
