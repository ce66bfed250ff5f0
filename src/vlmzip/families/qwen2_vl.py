"""Qwen2-VL: images and videos of any size, compressed after the patch merger, with M-RoPE positions."""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from transformers import PreTrainedModel
from transformers.processing_utils import ProcessorMixin

from vlmzip import mrope
from vlmzip.attachment import Attachment
from vlmzip.families.base import Card, Family, check_video_processor, register
from vlmzip.merging import Order
from vlmzip.methods.base import Method
from vlmzip.patch_merger import PackedTower


@register
@dataclass(frozen=True)
class Qwen2VL(Family):
    """K = min(budget, n) of the n merged tokens of an image, or of each frame of a video.

    The merger is the projector: under ``merge="reference"`` a contextual token is about twice as large
    as an ordinary one, in the language model's own space, as in the released code; ``merge="average"``
    keeps the magnitude.
    """

    tower: PackedTower

    name: ClassVar[str] = "qwen2_vl"
    processor_class: ClassVar[str] = "Qwen2VLProcessor"
    order: ClassVar[Order] = "raster"
    card: ClassVar[Card] = Card(
        models="Qwen2-VL",
        tower="ViT, rotary, no CLS; attention within a frame",
        layer="the last block",
        compressed="after the patch merger, on merged tokens, positions (M-RoPE) as uncompressed",
        count="min(K, n) an image and a frame pair of a video, n its merged tokens",
        tested="tiny random models, CPU; images and videos of different size in one prompt",
        untested="GPU, FlashAttention kernels, published checkpoints, FSDP, DeepSpeed",
    )

    @classmethod
    def from_config(cls, config: Any) -> Self:
        """Read the tower."""
        return cls(PackedTower.from_config(config.vision_config))

    def attachment(self, method: Method) -> Attachment:
        """State for views of any size: an image, or a frame of a video, is one view."""
        return mrope.MropeAttachment(self, method, cls_token=False, views=1, dynamic=True)

    def attach(self, base: PreTrainedModel, state: Attachment) -> None:
        """Tap the tower, compress what its features methods return, keep the positions."""
        assert isinstance(state, mrope.MropeAttachment)
        self.tower.attach(base.visual, state)
        mrope.attach(base, state)

    def attach_generation(self, model: PreTrainedModel, state: Attachment) -> None:
        """Encode before positions are made."""
        assert isinstance(state, mrope.MropeAttachment)
        mrope.attach_generation(model, state)

    def image_tokens(self, method: Method, stock: int, image_inputs: Any, index: int) -> int:
        """K of the image's merged tokens."""
        return self._count(method, stock, image_inputs, "image_grid_thw", "pixel_values", index)

    def sized_image_tokens(self, method: Method, stock: int, size: tuple[int, int]) -> int:
        """K of the image's merged tokens."""
        return method.budget.count(stock, dynamic=True)

    def video_tokens(self, method: Method, stock: int, video_inputs: Any, index: int) -> int:
        """K for each frame that the tower sees, which is two of the video's."""
        return self._count(method, stock, video_inputs, "video_grid_thw", "pixel_values_videos", index)

    def check_expanded(self, method: Method, placeholders: int, token: str) -> None:
        """Nothing to check: images differ in size, so any number of placeholders can be right."""

    def least_in_a_row(self, method: Method) -> int:
        """What is kept of two tokens: no image processor makes smaller images."""
        return method.budget.count(2, dynamic=True)

    def check_processor(self, processor: ProcessorMixin, config: Any, method: Method) -> None:
        """Check, on a dummy image and a dummy video, that a processor fits this model."""
        super().check_processor(processor, config, method)
        check_video_processor(self, processor, config, method)

    def _count(self, method: Method, stock: int, inputs: Any, grid: str, pixels: str, index: int) -> int:
        t, h, w = (int(size) for size in inputs[grid][index])
        tower = self.tower
        values = len(inputs[pixels][0])
        if stock != t * h * w // tower.merge**2 or values != tower.patch_values:
            raise ValueError(
                f"the processor makes {stock} tokens of {t} x {h} x {w} patches of {values} numbers, "
                f"where this model merges {tower.merge} x {tower.merge} patches of {tower.patch_values}: "
                "its patch_size, temporal_patch_size or merge_size is another model's"
            )
        return t * method.budget.count(stock // t, dynamic=True)
