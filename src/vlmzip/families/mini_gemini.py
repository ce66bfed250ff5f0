"""Mini-Gemini: low-resolution tokens are selected, and only those mine the high resolution."""

import functools
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.generic import can_return_tuple

from vlmzip.attachment import Attachment, selections_of
from vlmzip.families.base import Card, explain_mismatch, register
from vlmzip.families.llava import Llava
from vlmzip.merging import ZipOutput
from vlmzip.methods.base import Method
from vlmzip.mini_gemini import MiniGeminiModel, MiniGeminiProcessor
from vlmzip.towers import Tower


@register
@dataclass(frozen=True)
class MiniGemini(Llava):
    """K tokens an image, compressed between the CLIP tower's layer -2 and patch info mining.

    A dominant token mines the high-resolution window of its own patch, a contextual token that of its
    target. The CLS token has no window and goes on to the projector as it is.
    """

    high_side: int

    name: ClassVar[str] = "mini_gemini"
    processor_class: ClassVar[str] = "MiniGeminiProcessor"
    card: ClassVar[Card] = Card(
        models="Mini-Gemini (vlmzip.mini_gemini; not in transformers)",
        tower="CLIP (CLS sent on), and a ConvNeXt that is run as it is",
        layer="vision_feature_layer, usually -2",
        compressed="before patch info mining, which kept tokens alone do",
        count="K",
        tested="tiny random models, CPU; loading a tiny checkpoint of the published layout",
        untested="GPU, FlashAttention kernels, published checkpoints, FSDP, DeepSpeed; no HD models",
    )

    @classmethod
    def from_config(cls, config: Any) -> Self:
        """Read the CLIP tower; MiniGeminiConfig has checked that it is one, and the strategy."""
        tower = Tower.from_config(config.vision_config, config.vision_feature_layer)
        return cls(tower, tower.patches, config.high_image_size)

    @classmethod
    def processor_type(cls) -> Any:
        """Ours: transformers has none."""
        return MiniGeminiProcessor

    def image_tokens(self, method: Method, stock: int, image_inputs: Any, index: int) -> int:
        """K, for every image; its high-resolution pixels must be of the model's size."""
        k = super().image_tokens(method, stock, image_inputs, index)
        height, width = np.shape(image_inputs["pixel_values_high"][index])[-2:]
        if (height, width) != (self.high_side, self.high_side):
            raise ValueError(
                f"the processor makes high-resolution images of {height} x {width} pixels where this "
                f"model takes {self.high_side} x {self.high_side}: its high_image_size is another model's"
            )
        return k

    def attach(self, base: PreTrainedModel, state: Attachment) -> None:
        """Tap the CLIP tower; compress between it and the mining."""
        self.tower.attach(base.vision_tower, state)
        state.patches.set_method(base, "get_image_features", _get_image_features)
        state.patches.set_method(base, "get_placeholder_mask", explain_mismatch)


@functools.wraps(MiniGeminiModel.get_image_features)
@can_return_tuple  # type: ignore[untyped-decorator]
def _get_image_features(
    self: Any, pixel_values: Tensor, pixel_values_high: Tensor | None = None, **kwargs: Any
) -> Any:
    """What the stock method does, on the kept tokens and their windows."""
    state: Attachment = self._vlmzip
    tower: Tower = state.family.tower
    tower.check_layer(self.config, "vision_feature_layer", None)
    state.family.check_unchanged(self.config)
    with state.tap.listen() as reading:
        outputs, hidden_BND = self.encode_low(pixel_values, **kwargs)
        ((scores_BN, keys_BNd),) = reading.take()
        zipped = state.zip_views(hidden_BND, scores_BN, keys_BNd, tower.grid)
    windows_BNWC = self.high_windows(pixel_values_high, len(pixel_values))
    mined_BKD = _mine(self.mining, zipped, windows_BNWC, cls_token=state.method.send_cls)
    torch._assert_async(
        mined_BKD.isfinite().all(),
        "the high-resolution tower gave NaN or infinite values; check its weights and dtype",
    )
    outputs.pooler_output = list(self.multi_modal_projector(mined_BKD))
    state.record(selections_of(zipped, tower.grid, [1] * len(pixel_values)))
    return outputs


def _mine(mining: Any, zipped: ZipOutput, windows_BNWC: Tensor, cls_token: bool) -> Tensor:
    """Each kept token with what it mines from the window of the patch that it stands for."""
    source_BK = _sources(zipped)
    patch_BK = (source_BK - int(cls_token)).clamp(min=0)
    index_BK11 = patch_BK[:, :, None, None].to(windows_BNWC.device)
    mined_BKD: Tensor = mining(zipped.tokens, torch.take_along_dim(windows_BNWC, index_BK11, dim=1))
    if not cls_token:
        return mined_BKD
    return torch.where((source_BK == 0).unsqueeze(-1), zipped.tokens, mined_BKD)


def _sources(zipped: ZipOutput) -> Tensor:
    """[B, K]: the token that each row is, or whose place it has, as a contextual token's target."""
    kept_BK = torch.cat([zipped.dominant, zipped.contextual], dim=1)
    row_BK = zipped.assignment.gather(1, kept_BK)
    return torch.zeros_like(kept_BK).scatter(1, row_BK, kept_BK)
