"""LLaVA-NeXT-Video: images as in LLaVA-NeXT, and videos whose frames are pooled."""

import functools
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from torch import Tensor
from torch.nn.functional import avg_pool2d
from transformers import LlavaNextVideoModel, PreTrainedModel
from transformers.processing_utils import ProcessorMixin

from vlmzip.attachment import Attachment, selections_of
from vlmzip.families.base import Card, check_video_processor, place_in_prompt, register
from vlmzip.families.llava_next import LlavaNext
from vlmzip.methods.base import Grid, Method
from vlmzip.select_strategy import check_strategy


@register
@dataclass(frozen=True)
class LlavaNextVideo(LlavaNext):
    """K tokens a view of an image, as in LLaVA-NeXT, and K a frame of a video.

    A frame's patches are pooled before the projector; pooled tokens are compressed, by the mean of the
    scores and keys that each one covers. The CLS token chooses but is not sent on with a frame: the
    pooling has no place for it. A frame with fewer pooled tokens than the budget keeps all of them.
    """

    stride: int

    name: ClassVar[str] = "llava_next_video"
    processor_class: ClassVar[str] = "LlavaNextVideoProcessor"
    card: ClassVar[Card] = Card(
        models="LLaVA-NeXT-Video",
        tower="CLIP (CLS sent on with images) or SigLIP (no CLS)",
        layer="vision_feature_layer, usually -2",
        compressed="before the projector; videos after their pooling, without CLS",
        count="K x (crops + 1) an image, K x frames a video",
        tested="tiny random models, CPU; images, videos, both in one prompt",
        untested="GPU, FlashAttention kernels, published checkpoints, FSDP, DeepSpeed",
    )

    @classmethod
    def from_config(cls, config: Any) -> Self:
        """Read tower, layer, pinpoints and pooling; refused are the configs that LLaVA-NeXT refuses."""
        images = LlavaNext.from_config(config)
        return cls(images.tower, images.anyres, images.full, config.spatial_pool_stride)

    @property
    def frame_grid(self) -> Grid:
        """Rows and columns of a frame's pooled tokens."""
        rows, columns = self.tower.grid
        return rows // self.stride, columns // self.stride

    def attachment(self, method: Method) -> Attachment:
        """State for views of a fixed size and frames that have fewer tokens."""
        self._count(method)
        return Attachment(
            self, method, cls_token=self.tower.cls_token, views=self.anyres.most_views, dynamic=True
        )

    def attach(self, base: PreTrainedModel, state: Attachment) -> None:
        """As LLaVA-NeXT's, and compress what leaves the videos' pooling."""
        super().attach(base, state)
        state.patches.set_method(base, "get_video_features", _get_video_features)
        state.patches.set_method(base, "get_placeholder_mask", place_in_prompt)
        state.patches.set(base.vision_resampler, "_vlmzip", state)
        state.patches.set_forward(base.vision_resampler, _pool)

    def video_tokens(self, method: Method, stock: int, video_inputs: Any, index: int) -> int:
        """K times the frames of the video."""
        shape = [int(length) for length in np.shape(video_inputs["pixel_values_videos"][index])]
        side = self.anyres.side
        if stock != shape[0] * (self.tower.patches // 4) or shape[-2:] != [side, side]:
            raise ValueError(
                f"the processor makes {stock} tokens of a video of shape {shape} where this model has "
                f"{self.tower.patches // 4} for each frame of {side} x {side} pixels: its video size or "
                "patch size is another model's"
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
        """Check, on dummy images and a dummy video, that a processor fits this model."""
        super().check_processor(processor, config, method)
        check_video_processor(self, processor, config, method)

    def _frame_count(self, method: Method) -> int:
        pooled = self.frame_grid[0] * self.frame_grid[1]
        return method.budget.count(pooled, views=self.anyres.most_views, dynamic=True)


@functools.wraps(LlavaNextVideoModel.get_video_features)
def _get_video_features(
    self: Any,
    pixel_values_videos: Tensor,
    vision_feature_layer: Any = None,
    vision_feature_select_strategy: str | None = None,
    **kwargs: Any,
) -> Any:
    """The stock method, listened to; only patches can be pooled, whatever images do."""
    state: Attachment = self._vlmzip
    family: LlavaNextVideo = state.family
    family.tower.check_layer(self.config, "vision_feature_layer", vision_feature_layer)
    check_strategy(self.config, vision_feature_select_strategy)
    family.check_unchanged(self.config)
    videos, frames = pixel_values_videos.shape[:2]
    with state.tap.listen() as reading:
        reading.late = True
        features = type(self).get_video_features(
            self,
            pixel_values_videos,
            vision_feature_select_strategy="default" if family.tower.cls_token else "full",
            **kwargs,
        )
    selections = selections_of(reading.zipped, family.frame_grid, [frames] * videos)
    state.record(selections, "video")
    return features


def _pool(self: Any, image_features: Tensor) -> Tensor:
    """The model's pooling of frames, and K of a frame's pooled tokens."""
    state: Attachment = self._vlmzip
    pooled_FND: Tensor = self._vlmzip_forward(image_features)
    reading = state.tap.reading
    if reading is None:
        return pooled_FND
    family: LlavaNextVideo = state.family
    ((scores_FN, keys_FNd),) = reading.take()
    if family.tower.cls_token:
        scores_FN, keys_FNd = scores_FN[:, 1:], keys_FNd[:, 1:]
    scores_FN = _mean(scores_FN.unsqueeze(-1), family).squeeze(-1)
    keys_FNd = _mean(keys_FNd, family)
    reading.zipped = state.zip_views(pooled_FND, scores_FN, keys_FNd, family.frame_grid, pooled=True)
    return reading.zipped.tokens


def _mean(patches_FNd: Tensor, family: LlavaNextVideo) -> Tensor:
    """Mean over the patches that each pooled token covers, whichever way the model pools features."""
    frames, _, size = patches_FNd.shape
    grid_FdHW = patches_FNd.transpose(1, 2).reshape(frames, size, *family.tower.grid)
    return avg_pool2d(grid_FdHW, family.stride).flatten(2).transpose(1, 2)
