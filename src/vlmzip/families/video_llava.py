"""Video-LLaVA: images and videos, one CLIP-like tower for each, every frame a view."""

import functools
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor
from transformers import PreTrainedModel, VideoLlavaModel
from transformers.processing_utils import ProcessorMixin

from vlmzip.attachment import Attachment, selections_of
from vlmzip.errors import UnsupportedModelError
from vlmzip.families.base import Card, check_video_processor, place_in_prompt, register
from vlmzip.families.llava import Llava
from vlmzip.methods.base import Method
from vlmzip.select_strategy import check_strategy
from vlmzip.towers import Tower


@register
@dataclass(frozen=True)
class VideoLlava(Llava):
    """K tokens an image and K a frame, compressed between a tower's layer -2 and the projector.

    The paper keeps 136 of a video's 8 x 257 tokens and does not say how it splits the 17 a frame;
    ``VisionZip(tokens=17)`` splits them as its other budgets are split, 14 + 3. LanguageBind's towers
    are plain CLIP towers in transformers: frames do not attend to each other.
    """

    name: ClassVar[str] = "video_llava"
    processor_class: ClassVar[str] = "VideoLlavaProcessor"
    card: ClassVar[Card] = Card(
        models="Video-LLaVA",
        tower="CLIP-like, one for images and one for videos (CLS sent on)",
        layer="vision_feature_layer, usually -2",
        compressed="before the projector",
        count="K an image, K x frames a video; the paper's 136 are 8 x 17, how it splits the 17 is not "
        "published (14 + 3 here)",
        tested="tiny random models, CPU; images, videos, both in one prompt",
        untested="GPU, FlashAttention kernels, published checkpoints, FSDP, DeepSpeed",
    )

    @classmethod
    def from_config(cls, config: Any) -> Self:
        """Read the layout that both towers share; one without a CLS token is refused."""
        tower = Tower.from_config(config.vision_config, config.vision_feature_layer)
        if not tower.cls_token:
            raise UnsupportedModelError(
                f"a video_llava with a {config.vision_config.model_type!r} tower is not supported: its "
                "towers are expected to have a CLS token; supported: clip_vision_model"
            )
        full = config.vision_feature_select_strategy == "full"
        return cls(tower, tower.patches + full)

    def attachment(self, method: Method) -> Attachment:
        """State for a fixed resolution; ``total_tokens`` is refused, a video has any number of views."""
        if method.total_tokens is not None:
            raise ValueError(
                f"total_tokens={method.total_tokens} is a budget for images that are cut into crops; a "
                "video_llava budget counts per image and per frame: give tokens= (17 for 8 frames in 136)"
            )
        return super().attachment(method)

    def attach(self, base: PreTrainedModel, state: Attachment) -> None:
        """Tap both towers, keep CLS, compress what reaches the projector that they share."""
        self.tower.attach(base.image_tower, state)
        self.tower.attach(base.video_tower, state)
        state.patches.set_method(base, "get_image_features", _get_image_features)
        state.patches.set_method(base, "get_video_features", _get_video_features)
        state.patches.set_method(base, "get_placeholder_mask", place_in_prompt)
        self.tower.compress_before(base.multi_modal_projector, state)

    def video_tokens(self, method: Method, stock: int, video_inputs: Any, index: int) -> int:
        """K times the frames of the video."""
        frames = len(video_inputs["pixel_values_videos"][index])
        if stock != frames * self.tower.tokens(send_cls=True):
            raise ValueError(
                f"the processor makes {stock} tokens of a video of {frames} frames where this model "
                f"has {self.tower.tokens(send_cls=True)} a frame: its patch size, video size or "
                "num_additional_image_tokens is another model's"
            )
        return frames * self._count(method)

    def check_expanded(self, method: Method, placeholders: int, token: str) -> None:
        """Placeholders of prompts without images or videos must come in multiples of K."""
        if placeholders % self._count(method):
            raise ValueError(
                f"the text has {placeholders} {token} placeholders and nothing to put there; pass "
                f"images= or videos=, or write {self._count(method)} placeholders for each image or "
                "frame encoded before"
            )

    def check_processor(self, processor: ProcessorMixin, config: Any, method: Method) -> None:
        """Check, on a dummy image and a dummy video, that a processor fits this model."""
        super().check_processor(processor, config, method)
        check_video_processor(self, processor, config, method)


@functools.wraps(VideoLlavaModel.get_image_features)
def _get_image_features(
    self: Any,
    pixel_values_images: Any = None,
    vision_feature_layer: Any = None,
    vision_feature_select_strategy: str | None = None,
    pixel_values: Any = None,  # its name from transformers 5.23 on
    **kwargs: Any,
) -> Any:
    """The stock method on all of the tower's tokens: "default" drops CLS before the projector."""
    pixels: Tensor = pixel_values if pixel_values_images is None else pixel_values_images
    state: Attachment = self._vlmzip
    tower: Tower = state.family.tower
    tower.check_layer(self.config, "vision_feature_layer", vision_feature_layer)
    check_strategy(self.config, vision_feature_select_strategy)
    state.family.check_unchanged(self.config)
    with state.tap.listen() as reading:
        features = type(self).get_image_features(
            self,
            pixels,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy="full",
            **kwargs,
        )
    views = [1] * pixels.shape[0]
    state.record(selections_of(reading.zipped, tower.grid, views), "image")
    return features


@functools.wraps(VideoLlavaModel.get_video_features)
def _get_video_features(
    self: Any, pixel_values_videos: Tensor, vision_feature_layer: Any = None, **kwargs: Any
) -> Any:
    """The stock method, listened to; it sends the CLS tokens on by itself."""
    state: Attachment = self._vlmzip
    tower: Tower = state.family.tower
    tower.check_layer(self.config, "vision_feature_layer", vision_feature_layer)
    state.family.check_unchanged(self.config)
    with state.tap.listen() as reading:
        features = type(self).get_video_features(
            self, pixel_values_videos, vision_feature_layer=vision_feature_layer, **kwargs
        )
    videos, frames = pixel_values_videos.shape[:2]
    state.record(selections_of(reading.zipped, tower.grid, [frames] * videos), "video")
    return features
