"""InternVL: crops, a thumbnail and video frames, compressed after the pixel shuffle and projector."""

import functools
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from transformers import InternVLModel, PreTrainedModel
from transformers.processing_utils import ProcessorMixin
from transformers.utils.generic import can_return_tuple

from vlmzip.attachment import Attachment
from vlmzip.capture import skip_while_armed, tap_attention
from vlmzip.errors import UnsupportedModelError
from vlmzip.families.base import Card, Family, check_video_processor, explain_mismatch, register
from vlmzip.merging import Order
from vlmzip.methods.base import Method
from vlmzip.pixel_shuffle import ShuffledTower, runs
from vlmzip.select_strategy import check_strategy


@register
@dataclass(frozen=True)
class InternVL(Family):
    """K tokens a crop, a thumbnail and a video frame.

    The CLS token scores the patches and is not sent on, whatever ``send_cls`` says: the model drops it
    before the pixel shuffle and never projects it. Kept tokens are tokens of the language model's own
    space; ``merge="reference"`` makes contextual ones about twice as large there, ``"average"`` does not.

    The model is not told which crops are one image's. :attr:`Compressed.last` takes it from the prompt,
    where an image's tokens stand together and each frame of a video stands alone: a frame is an entry.
    """

    shuffled: ShuffledTower

    name: ClassVar[str] = "internvl"
    processor_class: ClassVar[str] = "InternVLProcessor"
    order: ClassVar[Order] = "raster"
    card: ClassVar[Card] = Card(
        models="InternVL3, InternVL3.5 and others in transformers' own format (-hf)",
        tower="InternViT (CLS scores and is not sent on)",
        layer="vision_feature_layer, usually -1",
        compressed="after the projector, on tokens merged 2 x 2, every view on its own",
        count="K x (crops + thumbnail), K x frames",
        tested="tiny random models, CPU; images, videos, both in one prompt",
        untested="GPU, FlashAttention kernels, published checkpoints, FSDP, DeepSpeed",
    )

    @classmethod
    def from_config(cls, config: Any) -> Self:
        """Read tower, layer and shuffle; several layers, or a strategy that keeps CLS, are refused."""
        if config.vision_config.model_type != "internvl_vision":
            raise UnsupportedModelError(
                f"an internvl with a {config.vision_config.model_type!r} tower is not supported; "
                "supported: internvl_vision"
            )
        layer = config.vision_feature_layer
        if not isinstance(layer, int):
            raise UnsupportedModelError(f"vision_feature_layer={layer} must be one layer of the tower")
        if config.vision_feature_select_strategy != "default":
            raise UnsupportedModelError(
                f"vision_feature_select_strategy={config.vision_feature_select_strategy!r} keeps the CLS "
                'token, with which the patches are no square to be shuffled; set it to "default"'
            )
        side = 1 / config.downsample_ratio
        if not side.is_integer():
            raise UnsupportedModelError(
                f"downsample_ratio={config.downsample_ratio} does not merge whole patches; "
                "it must be 1 / 2, 1 / 4 or the like"
            )
        vision = config.vision_config
        return cls(ShuffledTower.from_config(vision, side=int(side), cls_token=True, layer=layer))

    def attachment(self, method: Method) -> Attachment:
        """State for views of a fixed size; a budget for whole images is refused."""
        self.shuffled.count(method)
        return Attachment(self, method, cls_token=True, views=1, dynamic=False)

    def attach(self, base: PreTrainedModel, state: Attachment) -> None:
        """Tap the tower, compress what the projector gives."""
        blocks = base.vision_tower.encoder.layer
        tap_attention(blocks[self.shuffled.tower.block].attention, state.tap, state.patches)
        for block in blocks[self.shuffled.tower.block + 1 :]:
            skip_while_armed(block, state.tap, state.patches)
        state.patches.set_method(base, "get_image_features", _get_image_features)
        state.patches.set_method(base, "get_placeholder_mask", _get_placeholder_mask)

    def image_tokens(self, method: Method, stock: int, image_inputs: Any, index: int) -> int:
        """K times the image's crops, its thumbnail counted."""
        return self.shuffled.views(stock, image_inputs) * self.shuffled.count(method)

    def sized_image_tokens(self, method: Method, stock: int, size: tuple[int, int]) -> int:
        """K times the views, and the two tokens that begin and end an image, which stock counts too."""
        n = self.shuffled.tokens
        return stock - (stock - 2) // n * (n - self.shuffled.count(method))

    def video_tokens(self, method: Method, stock: int, video_inputs: Any, index: int) -> int:
        """K times the frames of the video."""
        return self.shuffled.views(stock, video_inputs) * self.shuffled.count(method)

    def check_expanded(self, method: Method, placeholders: int, token: str) -> None:
        """Placeholders of prompts without images or videos must come in multiples of K."""
        self.shuffled.check_expanded(method, placeholders, token)

    def check_processor(self, processor: ProcessorMixin, config: Any, method: Method) -> None:
        """Check, on a dummy image and a dummy video, that a processor fits this model."""
        super().check_processor(processor, config, method)
        self.shuffled.check_length(processor, "image_seq_length")
        check_video_processor(self, processor, config, method)


@functools.wraps(InternVLModel.get_image_features)
@can_return_tuple  # type: ignore[untyped-decorator]
def _get_image_features(
    self: Any,
    pixel_values: Tensor,
    vision_feature_layer: Any = None,
    vision_feature_select_strategy: str | None = None,
    **kwargs: Any,
) -> Any:
    """The stock method, listened to, and K of the tokens that it gives for each view."""
    state: Attachment = self._vlmzip
    shuffled: ShuffledTower = state.family.shuffled
    shuffled.tower.check_layer(self.config, "vision_feature_layer", vision_feature_layer)
    check_strategy(self.config, vision_feature_select_strategy)
    state.family.check_unchanged(self.config)
    shuffled.check_pixels(pixel_values)
    kwargs["return_dict"] = True
    with state.tap.listen() as reading:
        features = type(self).get_image_features(self, pixel_values=pixel_values, **kwargs)
    features.pooler_output = shuffled.compress(features.pooler_output, reading, state)
    return features


def _get_placeholder_mask(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The stock check; in the prompt, an image's views stand together."""
    mask_BS1 = explain_mismatch(self, *args, **kwargs)
    if not torch.compiler.is_compiling():
        state: Attachment = self._vlmzip
        k = state.family.shuffled.count(state.method)
        found = runs(mask_BS1.squeeze(-1))
        state.join([[length // k for _, length in row] for row in found])
    return mask_BS1
