"""LLaVA-OneVision: images in crops, several images, and videos whose frames are pooled."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from torch import Tensor
from transformers import LlavaOnevisionModel, PreTrainedModel
from transformers.processing_utils import ProcessorMixin
from transformers.utils.generic import can_return_tuple

from vlmzip.anyres import Anyres, size_pairs
from vlmzip.attachment import Attachment, selections_of
from vlmzip.errors import UnsupportedModelError
from vlmzip.families.base import Card, Family, check_video_processor, place_in_prompt, register
from vlmzip.families.llava_next import pack_image_features
from vlmzip.merging import Order
from vlmzip.methods.base import Grid, Method
from vlmzip.select_strategy import check_strategy
from vlmzip.towers import Tower


@register
@dataclass(frozen=True)
class LlavaOnevision(Family):
    """K tokens a view and K a frame, nothing else: no newline tokens, no unpadding, no shrinking.

    An image alone in its prompt is a base view and crops; images that share a prompt (given as nested
    lists) are one view each. Their tokens are compressed before the projector; what stock does to keep a
    large image short (``anyres_max_9`` shrinks its crops) has nothing left to do. A video's frames are
    pooled 2 x 2 after the projector, as the model was trained; they are compressed after that, by scores
    and keys that are pooled alike, so a kept token is one that the language model knows. A frame with
    fewer pooled tokens than the budget keeps all of them.
    """

    tower: Tower
    anyres: Anyres

    name: ClassVar[str] = "llava_onevision"
    processor_class: ClassVar[str] = "LlavaOnevisionProcessor"
    order: ClassVar[Order] = "raster"
    card: ClassVar[Card] = Card(
        models="LLaVA-OneVision",
        tower="SigLIP (no CLS)",
        layer="vision_feature_layer, usually -1",
        compressed="images before the projector, every view on its own; videos after the pooling",
        count="K x (crops + 1), K where images share a prompt, K x frames",
        tested="tiny random models, CPU; images, videos, both in one prompt",
        untested="GPU, FlashAttention kernels, published checkpoints, FSDP, DeepSpeed",
    )

    @classmethod
    def from_config(cls, config: Any) -> Self:
        """Read tower, layer and pinpoints; towers with a CLS token, and "default", are refused."""
        tower = Tower.from_config(config.vision_config, config.vision_feature_layer)
        if tower.cls_token:
            raise UnsupportedModelError(
                f"a llava_onevision with a {config.vision_config.model_type!r} tower is not supported: "
                "its pooling has no place for a CLS token; supported: siglip_vision_model"
            )
        if config.vision_feature_select_strategy != "full":
            raise UnsupportedModelError(
                'vision_feature_select_strategy="default" drops the first token as CLS, but a '
                f"{config.vision_config.model_type!r} tower has none: an image patch would be lost; "
                'set config.vision_feature_select_strategy = "full", in the processor too'
            )
        return cls(tower, Anyres.from_config(config))

    @property
    def frame_grid(self) -> Grid:
        """Rows and columns of a frame's pooled tokens."""
        rows, columns = self.tower.grid
        return -(-rows // 2), -(-columns // 2)

    def attachment(self, method: Method) -> Attachment:
        """State for views of a fixed size and frames that have fewer tokens."""
        self._count(method)
        return Attachment(self, method, cls_token=False, views=self.anyres.most_views, dynamic=True)

    def attach(self, base: PreTrainedModel, state: Attachment) -> None:
        """Tap the tower; compress images at the projector and videos after their pooling."""
        self.tower.attach(base.vision_tower, state)
        state.patches.set_method(base, "get_image_features", _get_image_features)
        state.patches.set_method(base, "pack_image_features", pack_image_features)
        state.patches.set_method(base, "get_video_features", _get_video_features)
        state.patches.set_method(base, "apply_pooling", _apply_pooling)
        state.patches.set_method(base, "get_placeholder_mask", place_in_prompt)
        self.tower.compress_before(base.multi_modal_projector, state)

    def image_tokens(self, method: Method, stock: int, image_inputs: Any, index: int) -> int:
        """K times the views of the image."""
        sizes = size_pairs(image_inputs["image_sizes"])
        single = share_a_prompt(image_inputs["batch_num_images"], len(sizes))
        views = [1 if one else self.anyres.views(s) for s, one in zip(sizes, single, strict=True)]
        self.anyres.check_processed(image_inputs["pixel_values"], views, index)
        return views[index] * self._count(method)

    def sized_image_tokens(self, method: Method, stock: int, size: tuple[int, int]) -> int:
        """K times the views of an image of that size that is alone in its prompt."""
        return self.anyres.views(size) * self._count(method)

    def video_tokens(self, method: Method, stock: int, video_inputs: Any, index: int) -> int:
        """K times the frames of the video."""
        shape = [int(length) for length in np.shape(video_inputs["pixel_values_videos"][index])]
        pooled = self.frame_grid[0] * self.frame_grid[1]
        side = self.anyres.side
        if stock != shape[0] * pooled + 1 or shape[-2:] != [side, side]:
            raise ValueError(
                f"the processor makes {stock} tokens of a video of shape {shape} where this model has "
                f"{pooled} for each frame of {side} x {side} pixels and one more: its video size or "
                "num_image_tokens is another model's"
            )
        return shape[0] * self._frame_count(method)

    def check_expanded(self, method: Method, placeholders: int, token: str) -> None:
        """Placeholders of prompts without images or videos must come in multiples of K."""
        view, frame = self._count(method), self._frame_count(method)
        if placeholders % view and placeholders % frame:
            raise ValueError(
                f"the text has {placeholders} {token} placeholders and nothing to put there; pass "
                f"images= or videos=, or write {view} placeholders for each view and {frame} for each "
                "frame encoded before"
            )

    def check_processor(self, processor: ProcessorMixin, config: Any, method: Method) -> None:
        """Check, on a dummy image and a dummy video, that a processor fits this model."""
        super().check_processor(processor, config, method)
        self.anyres.check_processor(processor, self.tower.patches, self.tower.grid)
        check_video_processor(self, processor, config, method)

    def _count(self, method: Method) -> int:
        return self.anyres.count(method, self.tower.patches)

    def _frame_count(self, method: Method) -> int:
        pooled = self.frame_grid[0] * self.frame_grid[1]
        return method.budget.count(pooled, views=self.anyres.most_views, dynamic=True)


def share_a_prompt(batch_num_images: Any, images: int) -> list[bool]:
    """Per image whether its prompt has others, so that it is not cut into crops.

    Args:
        batch_num_images: Images of each prompt, a tensor or a list; None: every prompt has one.
        images: Images of the batch.

    Raises:
        ValueError: The counts are not of so many images.
    """
    if batch_num_images is None:
        return [False] * images
    rows = batch_num_images.tolist() if hasattr(batch_num_images, "tolist") else batch_num_images
    shared = [count != 1 for count in rows for _ in range(count)]
    if len(shared) != images:
        raise ValueError(
            f"batch_num_images {list(rows)} counts {len(shared)} images, image_sizes has {images}; "
            "pass on all that the processor returned: model(**inputs)"
        )
    return shared


@functools.wraps(LlavaOnevisionModel.get_image_features)
def _get_image_features(
    self: Any,
    pixel_values: Tensor,
    image_sizes: Tensor,
    vision_feature_layer: Any = None,
    vision_feature_select_strategy: str | None = None,
    vision_aspect_ratio: str | None = None,
    batch_num_images: Any = None,
    **kwargs: Any,
) -> Any:
    """The stock method, listened to."""
    state: Attachment = self._vlmzip
    family: LlavaOnevision = state.family
    _check_arguments(self, vision_feature_layer, vision_feature_select_strategy)
    single: Sequence[bool] = ()
    if image_sizes is not None:
        single = share_a_prompt(batch_num_images, len(image_sizes))
    views = family.anyres.views_in(pixel_values, image_sizes, single)
    with state.tap.listen() as reading:
        features = type(self).get_image_features(
            self,
            pixel_values=pixel_values,
            image_sizes=image_sizes,
            vision_aspect_ratio=vision_aspect_ratio,
            batch_num_images=batch_num_images,
            **kwargs,
        )
    state.record(selections_of(reading.zipped, family.tower.grid, views))
    return features


@functools.wraps(LlavaOnevisionModel.get_video_features)
@can_return_tuple  # type: ignore[untyped-decorator]
def _get_video_features(
    self: Any,
    pixel_values_videos: Tensor,
    vision_feature_layer: Any = None,
    vision_feature_select_strategy: str | None = None,
    **kwargs: Any,
) -> Any:
    """The stock method, listened to, without the newline token that it ends a video with."""
    state: Attachment = self._vlmzip
    _check_arguments(self, vision_feature_layer, vision_feature_select_strategy)
    videos, frames = pixel_values_videos.shape[:2]
    with state.tap.listen() as reading:
        reading.late = True
        features = type(self).get_video_features(self, pixel_values_videos, return_dict=True, **kwargs)
    features.pooler_output = features.pooler_output[:, :-1]
    selections = selections_of(reading.zipped, state.family.frame_grid, [frames] * videos)
    state.record(selections, "video")
    return features


def _apply_pooling(self: Any, image_features: Tensor) -> Tensor:
    """The stock pooling of frames, and K of a frame's pooled tokens."""
    stock = type(self).apply_pooling
    state: Attachment = self._vlmzip
    reading = state.tap.reading
    pooled_FND: Tensor = stock(self, image_features)
    if reading is None:
        return pooled_FND
    ((scores_FN, keys_FNd),) = reading.take()
    scores_FN, keys_FNd = stock(self, scores_FN.unsqueeze(-1)).squeeze(-1), stock(self, keys_FNd)
    grid = state.family.frame_grid
    reading.zipped = state.zip_views(pooled_FND, scores_FN, keys_FNd, grid, pooled=True)
    return reading.zipped.tokens


def _check_arguments(self: Any, layer: Any, strategy: str | None) -> None:
    self._vlmzip.family.tower.check_layer(self.config, "vision_feature_layer", layer)
    check_strategy(self.config, strategy)
    self._vlmzip.family.check_unchanged(self.config)
